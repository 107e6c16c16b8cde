# make demo   upscale a photograph, train a small teacher, distil a small student
# make test   format, lint, types and the test suite
# make gpu    tests and benchmarks on an NVIDIA GPU; results in benchmarks/results
#             make gpu PARTS="scan loader"   these parts only (list: python -m benchmarks.gpu --help)
#             make gpu PYTHON=python3        with the JAX that this Python has
#             make gpu TORCH=FILE.py:CLASS   beside a model in PyTorch
# The first two set up .venv first, and the third .venv-gpu with CUDA, from requirements.txt.

.PHONY: demo test gpu
.DELETE_ON_ERROR:

VENV := .venv/installed
VENV_GPU := .venv-gpu/installed
DRIVER := nvidia-smi --query-gpu=driver_version --format=csv,noheader

demo: $(VENV)
	.venv/bin/python demo.py

test: $(VENV)
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy
	.venv/bin/pytest -n 2 --dist loadgroup

gpu: $(if $(PYTHON),,$(VENV_GPU))
	$(or $(PYTHON),.venv-gpu/bin/python) -m benchmarks.gpu $(PARTS) $(if $(TORCH),--torch $(TORCH))

define install
	@python=$$(sh find_python.sh) && $$python -m venv --clear $(1)
	$(1)/bin/pip install --disable-pip-version-check --progress-bar off -r requirements.txt $(2)
	@touch $@
endef

$(VENV): requirements.txt constraints.txt
	$(call install,.venv)

# CUDA 13 needs driver 580 or newer.
$(VENV_GPU): requirements.txt constraints.txt
	@nvidia-smi -L > /dev/null 2>&1 || { echo "make gpu: no NVIDIA GPU or no driver here (nvidia-smi -L" \
	    "fails); nothing was installed" >&2; exit 1; }
	$(call install,.venv-gpu,"jax[$$($(DRIVER) | awk -F. 'NR == 1 {print $$1 < 580 ? "cuda12" : "cuda13"}')]")
