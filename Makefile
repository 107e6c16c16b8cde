# make demo   upscale a photograph, train a small teacher, distil a small student
# make test   format, lint, types and the test suite
# Both set up .venv first, from requirements.txt.

.PHONY: demo test
.DELETE_ON_ERROR:

VENV := .venv/installed

demo: $(VENV)
	.venv/bin/python demo.py

test: $(VENV)
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy
	.venv/bin/pytest -n 2

$(VENV): requirements.txt constraints.txt
	@python=$$(sh find_python.sh) && $$python -m venv --clear .venv
	.venv/bin/pip install --disable-pip-version-check --progress-bar off -r requirements.txt
	@touch $@
