# What can be done here; `make` alone lists it.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
# so that `python` and `dvc` in dvc.yaml's commands are those of .venv
IN_VENV := PYTHONUTF8=1 PATH="$(CURDIR)/$(BIN):$$PATH"

.PHONY: help run test check format ui serve stack-local promote rollback replay runs compare chat arena label bench clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' $(MAKEFILE_LIST) | while IFS='|' read -r name text; do \
		printf '  make %-11s %s\n' "$$name" "$$text"; done

run: .venv/installed .git  ## set up .venv where it is missing, and run what is out of date; QUICK=1: a trial in minutes, apart from it
	@$(IN_VENV) exec $(BIN)/python -m flows.rlhf --waits-ok $(if $(QUICK),--quick) $(STAGES)

test: .venv/pages .git  ## the same environment, and the tests
	@$(IN_VENV) exec $(BIN)/python -m pytest $(or $(TESTS),-n 3 --dist loadfile --no-loadscope-reorder)

check: .venv/installed  ## format, lint and types; a warning is an error
	@$(BIN)/ruff format --check flows tasks tests bench examples
	@$(BIN)/ruff check flows tasks tests bench examples
	@$(BIN)/mypy flows tasks tests bench examples
	@PATH="$(CURDIR)/$(BIN):$$PATH" hadolint docker/Dockerfile
	@PATH="$(CURDIR)/$(BIN):$$PATH" check-jsonschema --quiet --builtin-schema vendor.compose-spec docker/compose.yaml

format: .venv/installed  ## put the code into its format
	@$(BIN)/ruff format flows tasks tests bench examples
	@$(BIN)/ruff check --fix flows tasks tests bench examples

ui: .venv/installed  ## MLflow on http://127.0.0.1:5000 and Prefect on http://127.0.0.1:4200, until Ctrl-C
	@$(IN_VENV) exec $(BIN)/python -m flows.serve --pages $(ARGS)

serve: .venv/installed .git  ## the same with a worker that runs the deployments of prefect.yaml on their schedules
	@$(IN_VENV) exec $(BIN)/python -m flows.serve $(ARGS)

stack-local: .venv/installed .git  ## the stack of docker/ without Docker: PostgreSQL, S3, MLflow, Prefect, a worker
	@$(IN_VENV) exec $(BIN)/python -m flows.stack local

promote: .venv/installed  ## VERSION=policy/3 REASON="...": make it the champion
	@$(IN_VENV) exec $(BIN)/python -m tasks.registry promote "$(VERSION)" --reason "$(REASON)"

rollback: .venv/installed  ## REASON="...": back to the champion before
	@$(IN_VENV) exec $(BIN)/python -m tasks.registry rollback --reason "$(REASON)"

replay: .venv/installed  ## VERSION=policy/3 [ONLY=ppo]: make it again, and compare to the bit
	@$(IN_VENV) exec $(BIN)/python -m flows.replay "$(VERSION)" $(if $(ONLY),--only $(ONLY))

runs: .venv/installed  ## N=20: what each run changed, and what came of it
	@$(IN_VENV) exec $(BIN)/python -m flows.runs $(if $(N),--last $(N)) $(ARGS)

compare: .venv/installed  ## A=policy/3 [B=HEAD]: two runs side by side; versions, commits or MLflow runs
	@$(IN_VENV) exec $(BIN)/python -m flows.compare $(A) $(B)

chat: .venv/installed  ## MODEL=policy/3: talk to it here; without it to the champion, else to the newest candidate
	@$(IN_VENV) exec $(BIN)/python -m tasks.chat "$(MODEL)"

arena: .venv/pages  ## A=policy/3 B=sft: a page to vote on which answers better; without A the champion or candidate
	@$(IN_VENV) exec $(BIN)/python -m tasks.arena "$(A)" "$(B)" $(ARGS)

label: .venv/pages  ## the page where people write demonstrations and rank outputs: ARGS="--host 0.0.0.0 --port 7861"
	@$(IN_VENV) exec $(BIN)/python -m tasks.labels.page $(ARGS)

bench: .venv/installed .git  ## speed and memory beside trl's PPO: ONLY=ppo, QUICK=1 for one size in under 15 minutes
	@$(IN_VENV) exec $(BIN)/python -m bench $(if $(ONLY),--only $(ONLY)) $(if $(QUICK),--quick)

clean:  ## remove the environment and the tools' caches; data, models and records stay
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache

.venv/installed: requirements.lock
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { \
		echo 'error: Python 3.11 is needed and `$(PYTHON)` is another; name one: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)' >&2; \
		exit 1; }
	@echo 'installing into .venv; this takes some minutes, once'
	@"$(PYTHON)" -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	@touch $@

.venv/pages: .venv/installed requirements.pages.lock
	@echo 'installing what the pages need'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.pages.lock
	@touch $@

# DVC needs a repository; an unpacked archive has none
.git:
	@git rev-parse --git-dir >/dev/null 2>&1 || git init --quiet
