"""Child of ``test_offline.py``: ``LLM.generate`` and ``LLM.chat`` with steering; prints JSON."""

import json
import sys

from vllm import LLM, SamplingParams


def main(model: str, tree: str, questions: str) -> None:
    llm = LLM(
        model=model,
        dtype="float32",
        max_model_len=256,
        additional_config={"steerscope": json.loads(tree)},
    )
    tokenizer = llm.get_tokenizer()
    told = {"eager": llm.llm_engine.vllm_config.model_config.enforce_eager}
    for policy in (None, "force-unknown"):
        extra_args = {"steering": policy} if policy else None
        params = SamplingParams(temperature=0, max_tokens=32, extra_args=extra_args)
        chats = [[{"role": "user", "content": q}] for q in json.loads(questions)]
        prompts = [
            tokenizer.apply_chat_template(c, add_generation_prompt=True, tokenize=False)
            for c in chats
        ]
        told[f"chat {policy}"] = [o.outputs[0].text.strip() for o in llm.chat(chats, params)]
        told[f"generate {policy}"] = [
            o.outputs[0].text.strip() for o in llm.generate(prompts, params)
        ]
    print("RESULT " + json.dumps(told))


if __name__ == "__main__":
    main(*sys.argv[1:])
