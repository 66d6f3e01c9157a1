"""A GPU that is not there: fake tensors on `cuda`, with real shapes and no data.

    with fake_cuda() as gpu:
        model = gpu.model(config, torch.bfloat16)
        ...
    gpu.copies, gpu.syncs

Operations refuse mixed devices and wrong shapes as on a GPU. What depends on data is decided here: a boolean is true, a
float is ``gpu.number``, an integer is ``gpu.count``, a mask of two dimensions selects everything and one of a single
dimension nothing.
"""

from __future__ import annotations

import ctypes
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import GraphExecGroup
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, Qwen3Config

aten = torch.ops.aten
REAL_NUMPY = Tensor.numpy
CUDA, LAZY = 1, 17
"""Numbers in c10::DeviceType."""

QWEN3 = {
    "0.6b": (1024, 3072, 28, 16, True),
    "1.7b": (2048, 6144, 28, 16, True),
    "4b": (2560, 9728, 36, 32, True),
    "8b": (4096, 12288, 36, 32, False),
}


def qwen3(size: str, layers: int | None = None) -> Qwen3Config:
    """The config of Qwen3-``size``, with ``layers`` layers if that is given."""
    hidden, intermediate, depth, heads, tied = QWEN3[size]
    return Qwen3Config(
        vocab_size=151_936,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers or depth,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40_960,
        tie_word_embeddings=tied,
        bos_token_id=151_643,
        eos_token_id=151_645,
    )


@contextmanager
def fake_cuda() -> Iterator[FakeCuda]:
    """Pretend that there is a GPU."""
    patches = (
        (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        (torch.cuda, "is_bf16_supported", lambda *_: True),
        (torch.Tensor, "backward", _backward),
        (torch.autograd, "grad", _grad),
        (nn.functional, "scaled_dot_product_attention", _attention),
    )
    with ExitStack() as stack:
        stack.enter_context(_device_guard())
        for owner, name, value in patches:
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(_Saved, _Saved.unpack))
        stack.enter_context(FakeTensorMode())
        gpu = FakeCuda()
        stack.enter_context(mock.patch.object(torch.Tensor, "numpy", lambda tensor, **_: _numpy(tensor, gpu.number)))
        yield stack.enter_context(gpu)


class FakeCuda(TorchDispatchMode):
    """Counts what a GPU would be slowed down by, and the memory that would be taken."""

    def __init__(self) -> None:
        super().__init__()
        self.number, self.count = 0.0, 4  # what is read back from the device
        self.copies: Counter[str] = Counter()  # to_device, to_host
        self.written: Counter[tuple[int, ...]] = Counter()  # by shape, what operations write
        self.syncs: Counter[str] = Counter()  # by the operation that waits for the device
        self.allocated = self.peak = 0  # bytes on the device
        self._alive: set[int] = set()

    def model(
        self,
        config: PreTrainedConfig,
        dtype: torch.dtype,
        adapt: Callable[[PreTrainedModel], Any] = lambda model: model,
    ) -> Any:
        """What ``adapt`` makes of the causal model of ``config``, without weights, on the device."""
        with unset_fake_temporarily(), torch.device("meta"):
            model = adapt(AutoModelForCausalLM.from_config(config, dtype=dtype))
        self.take(model)
        return model.eval()

    def take(self, model: nn.Module) -> None:
        """Give every tensor of a model on `meta` a place on the device."""
        taken: dict[int, Tensor] = {}
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is None:
                        continue
                    if id(tensor) not in taken:
                        empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
                        is_parameter = isinstance(tensor, nn.Parameter)
                        taken[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
                    tensors[name] = taken[id(tensor)]

    # -- the account ---------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is aten._local_scalar_dense.default:
            return self._scalar(args[0])
        if func is aten.nonzero.default:
            return self._places(args[0])
        if func is aten.nonzero_numpy.default:
            return self._places(args[0]).unbind(1)
        if func is aten.repeat_interleave.Tensor:
            self._wait(args[0], "repeat_interleave")
            return args[0].new_zeros(len(args[0]) * self.count)
        if func in (aten.index.Tensor, aten.index_put_.default):
            args = (args[0], self._without_masks(args[1]), *args[2:])
        kwargs = kwargs or {}
        if func.namespace == "aten":
            with self:  # in inference mode a composite operation comes here whole
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        if not func.is_view and func not in (aten.empty.memory_format, aten.empty_like.default):
            self.written.update(tuple(tensor.shape) for tensor in tree_leaves(result) if isinstance(tensor, Tensor))
        if func in (aten._to_copy.default, aten.copy_.default):
            source = args[1] if func is aten.copy_.default else args[0]
            if source.device != result.device:
                self.copies["to_device" if result.is_cuda else "to_host"] += 1
        for tensor in tree_leaves(result):
            if isinstance(tensor, FakeTensor) and tensor.is_cuda:
                self._account(tensor.untyped_storage())
        return result

    def _wait(self, tensor: Tensor, operation: str) -> None:
        if tensor.is_cuda:
            self.syncs[operation] += 1

    def _scalar(self, tensor: Tensor) -> bool | float | int:
        self._wait(tensor, "item")
        if tensor.dtype == torch.bool:
            return True
        return self.number if tensor.dtype.is_floating_point else self.count

    def _places(self, mask: Tensor) -> Tensor:
        self._wait(mask, "nonzero")
        selected = mask.numel() if mask.ndim > 1 else 0
        return torch.empty(selected, mask.ndim, dtype=torch.int64, device=mask.device)

    def _without_masks(self, indices: Sequence[Tensor | None]) -> list[Tensor | None]:
        """``indices`` with the integers that a mask stands for."""
        integers: list[Tensor | None] = []
        for index in indices:
            is_mask = index is not None and index.dtype == torch.bool
            integers += self._places(index).unbind(1) if is_mask else [index]
        return integers

    def _account(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, -(-storage.nbytes() // 512) * 512  # torch's allocator rounds up
        if key not in self._alive:
            self._alive.add(key)
            self.allocated += size
            self.peak = max(self.peak, self.allocated)
            weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.allocated -= size


@contextmanager
def _device_guard() -> Iterator[None]:
    """Give `cuda` a device guard that does nothing, without which indexing and copies never reach the fake tensors.

    A build of torch for CUDA installs one by itself if it finds no GPU. A build for the CPU does so too, once a guard
    that counts no devices is in its place, such as that of lazy tensors.
    """
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * (LAZY + 1)).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    before = guards[CUDA]
    if before is None:
        guards[CUDA] = guards[LAZY]
    torch._C._ensureCUDADeviceGuardSet()
    try:
        yield
    finally:
        guards[CUDA] = before


def _numpy(tensor: Tensor, number: float) -> NDArray[Any]:
    if tensor.device.type != "cpu":
        raise TypeError(f"can't convert {tensor.device} tensor to numpy")
    if not isinstance(tensor, FakeTensor):
        return REAL_NUMPY(tensor)
    value = number if tensor.dtype.is_floating_point else 0
    return np.full(tuple(tensor.shape), value, str(tensor.dtype).removeprefix("torch."))


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention by the kernel that a GPU takes: a build for the CPU would choose plain products."""
    if torch.is_autocast_enabled("cuda"):
        query, key, value = (tensor.to(torch.get_autocast_dtype("cuda")) for tensor in (query, key, value))
    if enable_gqa:
        key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], 1) for tensor in (key, value))
    if attn_mask is None and query.dtype != torch.float32:
        return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
    bias = None
    if attn_mask is not None:
        bias = torch.where(attn_mask, 0.0, -torch.inf).to(query.dtype)
        bias = bias.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, query.requires_grad, dropout_p, is_causal, scale=scale
    )[0]


# -- autograd ------------------------------------------------------------------------------------------------------


class _Saved:
    """A tensor that a node keeps for its backward pass; given up once the node has run, as the engine does."""

    read: ClassVar[list[_Saved]] = []

    def __init__(self, tensor: Tensor) -> None:
        self.tensor: Tensor | None = tensor

    def unpack(self) -> Tensor:
        assert self.tensor is not None, "a graph can be walked once"
        _Saved.read.append(self)
        return self.tensor


def _backward(loss: Tensor) -> None:
    _walk(loss, {})


def _grad(
    loss: Tensor, inputs: Sequence[Tensor], *, allow_unused: bool = False, materialize_grads: bool = False
) -> tuple[Tensor, ...]:
    """``torch.autograd.grad`` of a scalar."""
    wanted: dict[Any, Tensor | None] = {torch.autograd.graph.get_gradient_edge(leaf).node: None for leaf in inputs}
    _walk(loss, wanted)
    assert allow_unused
    assert materialize_grads
    return tuple(
        torch.zeros_like(leaf) if gradient is None else gradient
        for leaf, gradient in zip(inputs, wanted.values(), strict=True)
    )


@torch.no_grad()
def _walk(loss: Tensor, wanted: dict[Any, Tensor | None]) -> None:
    """The backward pass from a scalar, node by node: torch's engine asks the device for its streams.

    Gradients of ``wanted`` leaves are put there. If none are wanted, gradients are added to their leaves.
    """
    root = loss.grad_fn
    assert root is not None
    waiting = _uses(root)
    gradients: dict[Any, list[Tensor | None]] = {root: [torch.ones_like(loss)]}
    ready = [root]
    with GraphExecGroup():
        while ready:
            node = ready.pop()
            given = gradients.pop(node, None)
            results: Any = (None,) * len(node.next_functions)
            if given is not None and node in wanted:
                wanted[node] = given[0]
            elif given is not None and not (wanted and hasattr(node, "variable")):
                results = node.apply(*given) if hasattr(node, "apply") else node(*given)
                results = results if isinstance(results, tuple) else (results,)
            given = None
            for saved in _Saved.read:
                saved.tensor = None
            _Saved.read.clear()
            for (following, number), result in zip(node.next_functions, results, strict=False):
                if following is None:
                    continue
                if result is not None:
                    _add(gradients, following, number, result)
                waiting[following] -= 1
                if waiting[following] == 0:
                    ready.append(following)
            results = result = None  # or they would outlive the gradients that they became


def _uses(root: Any) -> Counter[Any]:
    """How many gradients each node of a graph waits for."""
    uses: Counter[Any] = Counter()
    seen, todo = {root}, [root]
    while todo:
        for node, _ in todo.pop().next_functions:
            if node is not None:
                uses[node] += 1
                if node not in seen:
                    seen.add(node)
                    todo.append(node)
    return uses


def _add(gradients: dict[Any, list[Tensor | None]], node: Any, number: int, gradient: Tensor) -> None:
    """A gradient as torch's engine hands it on: on the device, of the shape and dtype of what it belongs to."""
    expected = node._input_metadata
    place = expected[number]
    if gradient.device != place.device:
        raise RuntimeError(f"{node.name()}: a gradient on {gradient.device} of a tensor on {place.device}")
    if gradient.shape != place.shape:
        gradient = gradient.sum_to_size(place.shape)
    gradient = gradient.to(place.dtype)
    inputs = gradients.setdefault(node, [None] * len(expected))
    before = inputs[number]
    inputs[number] = gradient if before is None else before + gradient
