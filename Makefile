# Everything happens in .venv: nothing is installed globally.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PARALLEL := --numprocesses 2 --dist loadfile

.PHONY: quickstart demo digits-checkpoint model-cards notebooks test test-processes test-slow test-minimum test-faults soak check docs wheel digits-frameworks cifar10-cpu cifar10-latent cifar10-speedrun benchmarks clean

$(VENV)/.installed: requirements.txt setup.py
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed: make PYTHON=python3.11')"
	$(PYTHON) -m venv $(VENV)
	@echo "Everything that the project needs is downloaded into $(VENV): 0.5 GB, 2.5 GB on the disk. On Linux torch"
	@echo "brings CUDA's libraries, some gigabytes more, unless pip is configured to find a build without them."
	$(BIN)/pip install $(if $(CI),--quiet) --requirement requirements.txt
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

quickstart: $(VENV)/.installed  ## Pretrain, generate and classify handwritten digits.
	$(BIN)/ddae quickstart

demo: $(VENV)/.installed  ## A page to look at: draw, classify, explore.
	$(BIN)/ddae demo

model-cards: $(VENV)/.installed  ## Rewrite the cards of the checkpoints in runs/.
	$(BIN)/python model_cards/render.py

notebooks: $(VENV)/.installed  ## Run the notebooks of examples/ from top to bottom, and keep what they show.
	$(BIN)/python examples/notebooks/execute.py

test: $(VENV)/.installed  ## Run the default tests, on two processes.
	$(BIN)/python -m pytest $(PARALLEL)

test-processes: $(VENV)/.installed  ## Run the tests that compare several processes with one.
	$(BIN)/python -m pytest -m processes

test-slow: $(VENV)/.installed  ## Run the tests that take minutes, and try fifty times as many examples of the laws.
	$(BIN)/python -m pytest -m slow
	DDAE_LAWS=50 $(BIN)/python -m pytest tests/test_laws.py tests/test_damage.py

test-minimum:  ## Run the default tests on the oldest supported versions, with the same torch.
	$(PYTHON) -m venv $(VENV)-minimum
	$(VENV)-minimum/bin/pip install --quiet --requirement requirements-minimum.txt
	$(VENV)-minimum/bin/pip install --quiet --no-deps --no-build-isolation --editable .
	$(VENV)-minimum/bin/python -m pytest $(PARALLEL)

test-faults: $(VENV)/.installed  ## Kill commands, fill disks and damage files, an hour long: make test-faults MOMENTS=20 SEED=7
	$(BIN)/python -m tests.faults --moments $(or $(MOMENTS),20) $(if $(SEED),--seed $(SEED)) \
		$(if $(ONLY),--only "$(ONLY)") $(if $(KINDS),--kinds $(KINDS))

soak: $(VENV)/.installed  ## Repeat small experiments in one process, and see whether memory grows: make soak MINUTES=60
	$(BIN)/python -m benchmarks.soak --minutes $(or $(MINUTES),60)

check: $(VENV)/.installed  ## Check lint, formatting and types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy ddae_hf

docs: $(VENV)/.installed  ## Build the site of docs/ into build/site; a broken link stops it.
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "The site is build/site/index.html. Its search needs a server: python3 -m http.server --directory build/site"

wheel: $(VENV)/.installed  ## Build the source distribution and the wheel, and check what PyPI would show of them.
	rm -rf build/lib build/bdist* dist
	$(BIN)/python -m build --outdir dist .
	$(BIN)/twine check --strict dist/*

digits-checkpoint: $(VENV)/.installed  ## Train the checkpoint that ships with the package, on MNIST: about three quarters of an hour on two busy CPU cores.
	$(BIN)/python -c "from pathlib import Path; from ddae_hf.experiments.digits import mnist, write_digits; \
		write_digits(Path('runs/digits_checkpoint/digits'), mnist())"
	$(BIN)/ddae pretrain --config mnist --max_train_steps 6000 --ema_decay 0.999 --checkpointing_steps 1000 \
		--sample_steps 2000 --dataset_name runs/digits_checkpoint/digits --output_dir runs/digits_checkpoint/checkpoint \
		--resume_from_checkpoint latest
	$(BIN)/ddae sweep --model_name_or_path runs/digits_checkpoint/checkpoint --pooling mean_2x2 --knn --baselines \
		--few_labels 1 3 10 30 100 --num_draws 10 --dataset_name runs/digits_checkpoint/digits \
		--output_dir runs/digits_checkpoint/sweep
	$(BIN)/python model_cards/ship.py
	$(BIN)/python model_cards/render.py

digits-frameworks: $(VENV)/.installed  ## Compare every framework with every network on handwritten digits.
	$(BIN)/python -m benchmarks.digits_frameworks --output_dir runs/digits_frameworks

cifar10-cpu: $(VENV)/.installed  ## Recreate the CPU checkpoint and its figures: make cifar10-cpu DDAE_CIFAR10_DIR=...
	@test -n "$(DDAE_CIFAR10_DIR)" || { echo "Set DDAE_CIFAR10_DIR to a folder of CIFAR-10 parquet files, or to uoft-cs/cifar10."; exit 1; }
	$(BIN)/accelerate launch --config_file examples/accelerate_configs/single.yaml \
		--num_cpu_threads_per_process $$($(BIN)/python -c "import os; print(os.cpu_count())") -m ddae_hf pretrain \
		--config cifar10_cpu --dataset_name "$(DDAE_CIFAR10_DIR)" \
		--output_dir runs/cifar10_cpu --resume_from_checkpoint latest
	$(BIN)/ddae generate --model_name_or_path runs/cifar10_cpu --output_dir runs/cifar10_cpu_samples
	$(BIN)/ddae probe --config cifar10_cpu_probe --model_name_or_path runs/cifar10_cpu \
		--dataset_name "$(DDAE_CIFAR10_DIR)" --output_dir runs/cifar10_cpu_classifier

cifar10-latent: $(VENV)/.installed  ## Train the small VAE and latent DiT and transfer it: make cifar10-latent DDAE_CIFAR10_DIR=...
	@test -n "$(DDAE_CIFAR10_DIR)" || { echo "Set DDAE_CIFAR10_DIR to a folder of CIFAR-10 parquet files, or to uoft-cs/cifar10."; exit 1; }
	$(BIN)/ddae train-vae --config cifar10_vae --dataset_name "$(DDAE_CIFAR10_DIR)" \
		--output_dir runs/cifar10_vae --resume_from_checkpoint latest
	$(BIN)/ddae encode --vae runs/cifar10_vae --dataset_name "$(DDAE_CIFAR10_DIR)" --mirror --batch_size 64 \
		--output_dir runs/cifar10_latents
	$(BIN)/accelerate launch --config_file examples/accelerate_configs/single.yaml \
		--num_cpu_threads_per_process $$($(BIN)/python -c "import os; print(os.cpu_count())") -m ddae_hf pretrain \
		--config cifar10_latent_dit --latents_dir runs/cifar10_latents --output_dir runs/cifar10_latent_dit \
		--resume_from_checkpoint latest
	$(BIN)/ddae transfer --model_name_or_path runs/cifar10_latent_dit --dataset_name "$(DDAE_CIFAR10_DIR)" \
		--layers decoder --batch_size 500 --encode_batch_size 64 --few_labels 1 10 100 --output_dir runs/cifar10_latent_transfer

cifar10-speedrun: $(VENV)/.installed  ## Train from scratch for good features on one GPU, and probe them: make cifar10-speedrun DDAE_CIFAR10_DIR=...
	@test -n "$(DDAE_CIFAR10_DIR)" || { echo "Set DDAE_CIFAR10_DIR to a folder of CIFAR-10 parquet files, or to uoft-cs/cifar10."; exit 1; }
	$(BIN)/accelerate launch --config_file examples/accelerate_configs/single.yaml \
		--dynamo_backend inductor -m ddae_hf pretrain --config cifar10_speedrun \
		--dataset_name "$(DDAE_CIFAR10_DIR)" --output_dir runs/cifar10_speedrun --resume_from_checkpoint latest
	$(BIN)/ddae sweep --model_name_or_path runs/cifar10_speedrun --dataset_name "$(DDAE_CIFAR10_DIR)" --dtype bfloat16 \
		--layers decoder --sigmas 0.03 0.05 0.08 0.14 --max_selection_samples 20000 --num_noise_samples 4 --num_views 2 \
		--random_flip --batch_size 1000 --output_dir runs/cifar10_speedrun_sweep

benchmarks: $(VENV)/.installed  ## Measure speed (this needs the checkpoint of cifar10-cpu): make benchmarks DDAE_CIFAR10_DIR=...
	@test -n "$(DDAE_CIFAR10_DIR)" || { echo "Set DDAE_CIFAR10_DIR to a folder of CIFAR-10 parquet files, or to uoft-cs/cifar10."; exit 1; }
	$(BIN)/python -m benchmarks.levers --compile
	$(BIN)/python -m benchmarks.feature_speed --compile --probe_checkpoint runs/cifar10_cpu --dataset_name "$(DDAE_CIFAR10_DIR)"
	$(BIN)/python -m benchmarks.sweep_speed --model_name_or_path runs/cifar10_cpu --dataset_name "$(DDAE_CIFAR10_DIR)" --max_train_samples 10000
	$(BIN)/python -m benchmarks.training_speed --dataset_name "$(DDAE_CIFAR10_DIR)" --learning_rate 4e-4 --lr_warmup_steps 20
	$(BIN)/python -m benchmarks.sample --model_name_or_path runs/cifar10_cpu --dataset_name "$(DDAE_CIFAR10_DIR)" --num_images 2000
	$(BIN)/python -m benchmarks.start --model_name_or_path runs/cifar10_cpu
	$(BIN)/python -m benchmarks.quality_per_minute --dataset_name "$(DDAE_CIFAR10_DIR)"

clean:  ## Remove what was built and run.
	rm -rf $(VENV) $(VENV)-minimum build dist *.egg-info runs
