"""What the files and folders are called that one stage writes and another reads; each name stands here once."""

import re

# A checkpoint folder: OpenVLA's own files
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
PREPROCESSOR = "preprocessor_config.json"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_FILES = (TOKENIZER, TOKENIZER_CONFIG, "special_tokens_map.json", "tokenizer.model", "added_tokens.json")
STATISTICS = "dataset_statistics.json"
NATIVE_WEIGHTS = "latest-checkpoint.pt"  # in checkpoints/ of a native Prismatic folder

# Beside the weights of a checkpoint or of an adapter
PROCESSOR = "processor.json"
ACTION_HEAD = "action_head.safetensors"
PROPRIO_PROJECTOR = "proprio_projector.safetensors"
MERGED_ADAPTER = "lora_adapter"  # a folder in OpenVLA-OFT's checkpoints: the adapter that their weights hold already
OPTIONS = "finetune.json"  # the flags that it was trained with
VERSIONS = "versions.json"
SUMS = "SHA256SUMS"

# An adapter folder: peft's files; the first marks a folder as one
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_WEIGHTS_BIN = "adapter_model.bin"  # as old versions of peft wrote it

# A training run's folder
LATEST = "latest"  # a link to the newest step folder
BEST = "best"  # a link to the one that validated best
BEST_VALUE = "best.json"
METRICS = "metrics.jsonl"
SKIPPED = "skipped.jsonl"
TRAINING_STATE = "training_state.pt"
CURVES = "curves.png"
FIRST_BATCH = "first_batch.png"
STEP = "step-{:06d}"
STEP_FOLDER = re.compile(r"latest|best|step-\d+")  # names within a run: the run's own name says more
UNFINISHED = ".unfinished-"  # begins the name of what is being written: whoever finds one without its writer deletes it

# A rollout folder
RESULTS = "results.jsonl"
SUMMARY = "summary.json"
RUN = "run.json"
REPORT = "report.html"

# A frame cache
CACHE_META = "meta.json"
CACHE_STEPS = "steps.npz"
CACHE_FRAMES = "frames.bin"

# A data set's folder: RLDS, as tensorflow_datasets writes it, and LeRobot
RLDS_INFO = "dataset_info.json"
RLDS_FEATURES = "features.json"
LEROBOT_INFO = "meta/info.json"
STAGED_NOTE = ".staged.json"  # in a data set that was made of staged episodes: which ones
