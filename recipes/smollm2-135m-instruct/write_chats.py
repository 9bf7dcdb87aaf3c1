"""Let SmolLM2-135M-Instruct write conversations with itself: the chat share of the shipped SAE's text.

The model writes the user's turn first (the template's user header is the whole prompt, as in Magpie,
arXiv 2406.08464) and then the reply. The model is Apache-2.0, so what it writes may be redistributed.
Sampling goes through `transformers.generate` on purpose: the training text must not depend on the
decode loop that the SAE is later used to test.

    python write_chats.py MODEL_DIR OUT.jsonl --conversations 1000 --seed 0
"""

import argparse
import json
import pathlib
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
# Openings spread the topics: left alone, a small model asks the same few questions.
OPENINGS = ["", "", "What", "How do I", "Why", "Write a", "Can you explain", "I need", "Give me", "Tell me about",
            "Who", "Which", "Is it", "My", "Translate", "Summarize", "List", "Create a", "When", "Help me",
            "I'm feeling", "Calculate", "Describe", "In the story", "Please edit"]  # fmt: skip


def sample(model, tokenizer, prompts, max_new_tokens, temperature):
    batch = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
    out = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=True, temperature=temperature,
                         top_p=0.95, top_k=0, pad_token_id=tokenizer.pad_token_id)  # fmt: skip
    texts = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=False)
    return [text.split("<|im_end|>")[0].replace("<|endoftext|>", "").strip() for text in texts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model_dir")
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--conversations", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model_dir, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(args.model_dir, dtype=torch.float32).eval()
    torch.manual_seed(args.seed)
    written, start = 0, time.time()
    with args.out.open("w") as out, torch.inference_mode():
        while written < args.conversations:
            openings = [OPENINGS[(written + i) % len(OPENINGS)] for i in range(args.batch)]
            head = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n"
            users = sample(model, tokenizer, [head + o for o in openings], 48, 1.0)
            users = [f"{o}{' ' if o and u and u[0].isalnum() else ''}{u}" for o, u in zip(openings, users, strict=True)]
            prompts = [f"{head}{u}<|im_end|>\n<|im_start|>assistant\n" for u in users]
            for prompt, reply in zip(prompts, sample(model, tokenizer, prompts, 176, 0.8), strict=True):
                if reply:
                    out.write(json.dumps({"text": f"{prompt}{reply}<|im_end|>\n"}) + "\n")
                    written += 1
            out.flush()
            print(f"{written} conversations, {time.time() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
