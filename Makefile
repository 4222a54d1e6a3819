# What can be done here; `make` alone lists it.

# In a sub-folder `Makefile` is a link to this file: the work is done where the file itself lies.
ROOT := $(shell cd "$$(dirname "$$(readlink -f '$(strip $(MAKEFILE_LIST))')")" && pwd -P)
ifneq ($(ROOT),$(CURDIR))
.PHONY: $(or $(MAKECMDGOALS),help)
$(or $(MAKECMDGOALS),help):
	@$(MAKE) --no-print-directory -C '$(ROOT)' $@
else

BIN := .venv/bin
# so that `python` and `dvc` in dvc.yaml's commands are those of .venv
IN_VENV := PYTHONUTF8=1 PATH="$(CURDIR)/$(BIN):$$PATH"

.PHONY: help run test check format ui serve stack-local promote rollback replay runs compare chat arena label bench lock clean
.PHONY: environment environment/pages environment/dev
.NOTPARALLEL:

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' Makefile | while IFS='|' read -r name text; do \
		printf '  make %-11s %s\n' "$$name" "$$text"; done

environment:  ## set up .venv where it is missing, and nothing else

run: environment .git  ## set up .venv where it is missing, and run what is out of date; QUICK=1: a trial in minutes, apart from it
	@$(IN_VENV) exec $(BIN)/python -m flows.rlhf --waits-ok $(if $(QUICK),--quick) $(STAGES)

test: environment/pages environment/dev .git  ## the environment with what tests need, and the tests
	@$(IN_VENV) exec $(BIN)/python -m pytest $(or $(TESTS),-n 3 --dist loadfile --no-loadscope-reorder)

check: environment/dev  ## format, lint and types; a warning is an error
	@$(BIN)/ruff format --check environment.py flows tasks tests bench examples
	@$(BIN)/ruff check environment.py flows tasks tests bench examples
	@$(BIN)/mypy environment.py flows tasks tests bench examples
	@PATH="$(CURDIR)/$(BIN):$$PATH" hadolint docker/Dockerfile
	@PATH="$(CURDIR)/$(BIN):$$PATH" check-jsonschema --quiet --builtin-schema vendor.compose-spec docker/compose.yaml

format: environment/dev  ## put the code into its format
	@$(BIN)/ruff format environment.py flows tasks tests bench examples
	@$(BIN)/ruff check --fix environment.py flows tasks tests bench examples

ui: environment  ## MLflow on http://127.0.0.1:5000 and Prefect on http://127.0.0.1:4200, until Ctrl-C
	@$(IN_VENV) exec $(BIN)/python -m flows.serve --pages $(ARGS)

serve: environment .git  ## the same with a worker that runs the deployments of prefect.yaml on their schedules
	@$(IN_VENV) exec $(BIN)/python -m flows.serve $(ARGS)

stack-local: environment/dev .git  ## the stack of docker/ without Docker: PostgreSQL, S3, MLflow, Prefect, a worker
	@$(IN_VENV) exec $(BIN)/python -m flows.stack local

promote: needs/VERSION needs/REASON environment  ## VERSION=policy/3 REASON="...": make it the champion
	@$(IN_VENV) exec $(BIN)/python -m tasks.registry promote "$(VERSION)" --reason "$(REASON)"

rollback: needs/REASON environment  ## REASON="...": back to the champion before
	@$(IN_VENV) exec $(BIN)/python -m tasks.registry rollback --reason "$(REASON)"

replay: needs/VERSION environment  ## VERSION=policy/3 [ONLY=ppo]: make it again, and compare to the bit
	@$(IN_VENV) exec $(BIN)/python -m flows.replay "$(VERSION)" $(if $(ONLY),--only $(ONLY))

runs: environment  ## N=20: what each run changed, and what came of it
	@$(IN_VENV) exec $(BIN)/python -m flows.runs $(if $(N),--last $(N)) $(ARGS)

compare: environment  ## A=policy/3 [B=HEAD]: two runs side by side; versions, commits or MLflow runs
	@$(IN_VENV) exec $(BIN)/python -m flows.compare $(A) $(B)

chat: environment  ## MODEL=policy/3: talk to it here; without it to the champion, else to the newest candidate
	@$(IN_VENV) exec $(BIN)/python -m tasks.chat "$(MODEL)"

arena: environment/pages  ## A=policy/3 B=sft: a page to vote on which answers better; without A the champion or candidate
	@$(IN_VENV) exec $(BIN)/python -m tasks.arena "$(A)" "$(B)" $(ARGS)

label: environment/pages  ## the page where people write demonstrations and rank outputs: ARGS="--host 0.0.0.0 --port 7861"
	@$(IN_VENV) exec $(BIN)/python -m tasks.labels.page $(ARGS)

bench: environment .git  ## speed and memory beside trl's PPO: ONLY=ppo, QUICK=1 for one size in under 15 minutes
	@$(IN_VENV) exec $(BIN)/python -m bench $(if $(ONLY),--only $(ONLY)) $(if $(QUICK),--quick)

clean:  ## remove the environment and the tools' caches; data, models and records stay
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache

lock:  ## pin anew what pyproject.toml asks for, keeping the versions that still fit; needs uv
	@cat requirements*.lock >.lock.tmp
	@uv pip compile --quiet pyproject.toml --extra pages --group dev --output-file .lock.tmp
	@echo '# By `make lock`, for Python 3.11 to 3.14. CUDA packages are not here, since torch pins its own: see pyproject.toml.' >requirements.lock
	@uv pip compile --quiet pyproject.toml --constraint .lock.tmp >>requirements.lock
	@for set in 'pages --extra' 'dev --group'; do name="$${set%% *}"; \
		uv pip compile --quiet pyproject.toml --constraint .lock.tmp "$${set#* }" "$$name" | \
			grep -vxFf requirements.lock >"requirements.$$name.lock"; done
	@rm .lock.tmp

# The Python that PYTHON= names, else that of .venv, else the newest that is there and works, else one that uv brings. A pyenv
# shim may be there and not work; one that cannot make a .venv comes last, and environment.py says what it lacks.
environment environment/pages environment/dev:
	@fits='import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 15))'; \
	works() { "$$1" -c "$$2$$fits" >/dev/null 2>&1; }; \
	set_up() { exec "$$1" environment.py $(patsubst environment/%,%,$(filter environment/%,$@)); }; \
	if [ -n "$$PYTHON" ]; then works "$$PYTHON" && set_up "$$PYTHON"; \
		echo "error: PYTHON=$$PYTHON does not run, or is not Python 3.11 to 3.14" >&2; exit 1; fi; \
	works .venv/bin/python && set_up .venv/bin/python; \
	pythons='python3.14 python3.13 python3.12 python3.11 python3'; \
	for python in $$pythons; do works "$$python" 'import ensurepip; ' && set_up "$$python"; done; \
	if command -v uv >/dev/null; then echo 'no Python 3.11 to 3.14 is here: uv brings 3.13'; \
		export UV_PYTHON_PREFERENCE=only-managed; \
		uv python install 3.13 && python="$$(uv python find 3.13)" && works "$$python" && set_up "$$python"; fi; \
	for python in $$pythons; do works "$$python" && set_up "$$python"; done; \
	echo 'error: no Python 3.11 to 3.14 is here: install one (apt install python3 python3-venv, or brew install python@3.13), or' \
		'uv, which brings one, or name one: make PYTHON=/path/to/python3' >&2; exit 1

needs/%:
	@test -n "$($*)" || { echo 'error: $* is missing: `make` alone shows what this target takes' >&2; exit 1; }

# DVC needs a repository; an unpacked archive has none
.git:
	@git rev-parse --git-dir >/dev/null 2>&1 || git init --quiet

endif
