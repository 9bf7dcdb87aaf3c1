"""Train a policy on prompts and a reward function, compare it with controls, and steer a prompt with it."""

import rich

import trimtab


def long_words(prompt: str, answer: str) -> float:
    return len(answer) / 20


model = trimtab.load_model("smollm2-135m-instruct")
sae = trimtab.load_sae("default", model=model)
prompts = [
    f"{who} saw the {what} and said" for who in ("Tom", "We", "She", "They") for what in ("sea", "inn", "hen", "dog")
]
policy = trimtab.train_policy(model, sae, prompts, long_words, max_new_tokens=3, initial_no_edit=0.0, iterations=20)
comparison = policy.compare(["random", "static", "prompting"])
rich.print(policy, comparison, policy.steer("The captain saw the ship and said"))
