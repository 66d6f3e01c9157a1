"""The model below its LM head, over packed rows. Letters: T scored tokens, R rows, L row length, D hidden size."""

from __future__ import annotations

from torch import Tensor, nn

from eopd.stages.models.lm_head import unwrap
from eopd.stages.models.packing import Packed

# These two honour the block-diagonal mask built from position resets for any number of rows. Flash attention reads
# the resets itself, and only of a single row: with several it would silently attend across sequences.
PACKING_ATTENTION = ("sdpa", "eager")


def final_hidden(model: nn.Module, packed: Packed) -> Tensor:
    """Hidden states [T, D] that predict each response token, final norm applied; differentiable.

    Raises:
        ValueError: an attention implementation for which packing is not known to be right.
    """
    inner = unwrap(model)
    attention = inner.config._attn_implementation
    if attention not in PACKING_ATTENTION:
        raise ValueError(
            f"{type(inner).__name__}: attn_implementation {attention!r} is refused with packed sequences; "
            f"load the model with one of {', '.join(PACKING_ATTENTION)}"
        )
    if getattr(inner.config.get_text_config(), "attn_logit_softcapping", None) is not None and attention != "eager":
        raise ValueError(
            f"{type(inner).__name__}: attn_implementation {attention!r} leaves out this model's attention soft-capping "
            "and is refused; load it with attn_implementation='eager'"
        )
    out = inner.base_model(
        input_ids=packed.input_ids, position_ids=packed.position_ids, attention_mask=None, use_cache=False
    )
    hidden: Tensor = out.last_hidden_state
    return hidden.flatten(0, 1).index_select(0, packed.predict_index)
