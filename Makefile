# make quickstart   set up .venv and run the main job on the embedded default; prints where the report is
# make test         set up .venv and run the tests (about 9 minutes on 2 cores)
# make test-fast    the tests that take under two seconds each, without vLLM (under 2 minutes)
# make coverage     the tests, traced (a third slower), then the lines and branches that none of them reached
# make check        linter and type checker
# make docs         the site, in build/site; a broken link or anchor fails
PY := .venv/bin/python
TRACED :=
PYTEST = -m pytest -q -n 2 --dist loadscope --no-loadscope-reorder

.PHONY: quickstart test test-fast coverage check docs setup format clean

setup:
	@./scripts/setup.sh

quickstart: setup
	@.venv/bin/eopd run quickstart

test: setup
	@OMP_NUM_THREADS=1 $(PY) $(TRACED) $(PYTEST)

test-fast: setup
	@OMP_NUM_THREADS=1 $(PY) $(PYTEST) -m "not slow and not vllm"

coverage:
	@rm -rf .coverage && mkdir .coverage
	@$(MAKE) --no-print-directory test TRACED="-m coverage run"
	@$(PY) -m coverage combine -q && $(PY) -m coverage report --skip-covered --sort=cover

check: setup
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/mypy -p eopd.pipeline -p eopd.stages -p eopd.storage

docs: setup
	@.venv/bin/uv pip install --quiet --python $(PY) --constraint scripts/constraints-cpu.txt ipykernel mkdocs-jupyter mkdocs-material "mkdocstrings[python]"
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

format: setup
	@.venv/bin/ruff check --fix .
	@.venv/bin/ruff format .

clean:
	rm -rf .venv .cache build runs store *.egg-info .pytest_cache .mypy_cache .ruff_cache .coverage coverage.xml
