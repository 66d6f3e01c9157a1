# make quickstart   set up .venv and run the main job on the embedded default; prints where the report is
# make test         set up .venv and run the tests (under 15 minutes on 2 cores)
# make check        linter and type checker
PY := .venv/bin/python

.PHONY: quickstart test check setup format clean

setup:
	@./scripts/setup.sh

quickstart: setup
	@.venv/bin/eopd run quickstart

test: setup
	@rm -rf .coverage && mkdir .coverage
	@OMP_NUM_THREADS=1 $(PY) -m coverage run -m pytest -q -n 2 --dist loadscope --no-loadscope-reorder
	@$(PY) -m coverage combine -q && $(PY) -m coverage report --skip-covered --sort=cover

check: setup
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@./scripts/typecheck.sh

format: setup
	@.venv/bin/ruff check --fix .
	@.venv/bin/ruff format .

clean:
	rm -rf .venv build runs store *.egg-info .pytest_cache .mypy_cache .ruff_cache .coverage coverage.xml
