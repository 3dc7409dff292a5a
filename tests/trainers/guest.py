"""The process of test_guest.py: takes stock of its own state around import, training and an error in it.

    python -m tests.trainers.guest OUTPUT_DIR

Prints one JSON object: moment -> what changed there, name -> [before, after].
"""

from __future__ import annotations

import gc
import json
import logging
import multiprocessing
import os
import random
import signal
import sys
import threading
import warnings
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

import accelerate
import datasets
import numpy as np
import peft
import torch
import transformers
from transformers.utils import logging as transformers_logging

__all__ = ["Stock", "main"]

Stock = dict[str, str]
_LIBRARIES = (accelerate, datasets, peft, transformers)  # what their imports do is theirs


def process_state() -> Stock:
    """Everything global that a library might be tempted to change, as text."""
    root = logging.getLogger()
    state = {
        "environ": dict(os.environ),
        "cwd": Path.cwd(),
        "sys.path": sys.path,
        "excepthook": sys.excepthook,
        "root logger": (root.level, root.handlers),
        "verbosity": (transformers_logging.get_verbosity(), datasets.logging.get_verbosity()),
        "other loggers": {
            module.__name__: (
                logging.getLogger(module.__name__).handlers,
                logging.getLogger(module.__name__).level,
            )
            for module in _LIBRARIES
        },
        "progress bars": (
            transformers_logging.is_progress_bar_enabled(),
            datasets.are_progress_bars_disabled(),
        ),
        "warning filters": warnings.filters,
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "tf32": (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32),
        "deterministic": (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic),
        "cudnn benchmark": torch.backends.cudnn.benchmark,
        "gradients": torch.is_grad_enabled(),
        "threads of torch": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "start method": multiprocessing.get_start_method(allow_none=True),
        "signal handlers": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "children": multiprocessing.active_children(),
    }
    return {name: repr(value) for name, value in state.items()}


def generators() -> Stock:
    """The global random states."""
    numpy = np.random.get_state()  # noqa: NPY002
    return {
        "random": repr(random.getstate()),
        "numpy": repr((numpy[1].tolist(), numpy[2:])),
        "torch": repr(torch.get_rng_state().tolist()),
    }


def descriptors() -> Stock:
    """Open files of this process."""
    gc.collect()
    folder = Path("/proc/self/fd")
    return {"descriptors": str(len(list(folder.iterdir())) if folder.exists() else 0)}


def belongings(tokenizer: Any, model: Any, data: Any, config: Any) -> Stock:
    """What the caller handed in, less the weights being trained."""
    return {
        "tokenizer": tokenizer.backend_tokenizer.to_str() + repr(tokenizer) + repr(tokenizer.chat_template),
        "model config": model.config.to_json_string(use_diff=False) + str(model.config._attn_implementation),
        "generation config": model.generation_config.to_json_string(use_diff=False),
        "forward": repr([name for name in vars(model) if name == "forward"]),
        "hooks": repr([(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]),
        "modes": repr([module.training for module in model.modules()]),
        "parameters": repr(
            [(n, p.dtype, p.requires_grad, p.grad is None) for n, p in model.named_parameters()]
        ),
        "frozen weights": repr([float(p.sum()) for p in model.parameters() if not p.requires_grad]),
        "data": repr(data),
        "config": repr(config),
    }


def changes(before: Stock, after: Stock) -> dict[str, list[str]]:
    """Names whose text differs, cut to what a person reads."""
    return {name: [before[name][:2000], after[name][:2000]] for name in before if before[name] != after[name]}


def main(output_dir: str) -> None:
    """Import, train, fail, and say what changed at each."""
    told = {}
    before = process_state()
    import ftlib as ft

    for name in ft.__all__:
        getattr(ft, name)
    told["import"] = changes(before, process_state())

    from tests.data.tokenizers_zoo import tiny as tiny_tokenizer
    from tests.models_zoo import tiny_model
    from tests.trainers.tiny import At, rows

    tokenizer, data = tiny_tokenizer(), rows(8)
    model = ft.adapters.attach(
        tiny_model("llama", vocab_size=len(tokenizer)), ft.adapters.lora(4, dropout=0.1)
    )
    config = ft.TrainConfig(output_dir=output_dir, save_steps=1, eval_steps=1, progress="off", batch_size=4)
    handed = (tokenizer, model, deepcopy(data), deepcopy(config))
    before = process_state() | belongings(*handed)
    trainer = ft.SFTTrainer(model, data, data, tokenizer=tokenizer, config=config)
    told["construction"] = changes(before, process_state() | belongings(tokenizer, model, data, config))

    trainer.step(data[:2])  # what torch opens and starts once, it does now
    model.eval()
    handed = (tokenizer, model, data, config)
    before = process_state() | generators() | descriptors() | belongings(*handed)
    trainer.train()
    trainer.evaluate()
    trainer.generate(["yes"], max_new_tokens=4)
    after = process_state() | generators() | descriptors() | belongings(*handed)
    told["training"] = changes(before, after)

    def fail(control: Any) -> None:
        raise LookupError("mine")

    failing = ft.SFTTrainer(model, data, config=ft.TrainConfig(progress="off", epochs=2))
    failing.add_callback(At("on_step_end", 1, fail))
    before = process_state() | generators() | descriptors() | belongings(*handed)
    with suppress(LookupError):
        failing.train()
    after = process_state() | generators() | descriptors() | belongings(*handed)
    told["an error in training"] = changes(before, after)
    print(json.dumps(told))


if __name__ == "__main__":
    main(sys.argv[1])
