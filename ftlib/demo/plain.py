"""Answer one question from a base model and a saved adapter, with peft and transformers alone.

Run as a script: it reads the job as JSON from standard input and writes the answer to standard output.
It imports nothing of ftlib, which is its point.
"""

from __future__ import annotations

import json
import sys

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    """Load, ask, print."""
    job = json.load(sys.stdin)
    tokenizer = AutoTokenizer.from_pretrained(job["adapter"])
    base = AutoModelForCausalLM.from_pretrained(job["base"], dtype="float32")
    model = PeftModel.from_pretrained(base, job["adapter"]).eval()
    chat = [{"role": "user", "content": job["question"]}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    asked = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
    with torch.inference_mode():
        ids = model.generate(**asked, max_new_tokens=job["tokens"], do_sample=False)
    answer = tokenizer.decode(ids[0, asked["input_ids"].shape[1] :], skip_special_tokens=True)
    json.dump({"answer": answer}, sys.stdout)


if __name__ == "__main__":
    main()
