"""Steering with the official OpenAI client: a policy's name rides along with the request.

pip install openai
python openai_client.py --base-url http://127.0.0.1:8000/v1
"""

from __future__ import annotations

import argparse
import json

import openai


def main() -> None:
    """The same question unsteered, by a policy's name, and with edits of its own."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--policy", default="force-known")
    parser.add_argument("--question", default="What instrument does Mira Solberg play?")
    arguments = parser.parse_args()
    client = openai.OpenAI(base_url=arguments.base_url, api_key="none")
    edits = {"interventions": [{"feature": "unknown_entity", "ablate": True, "phase": "prompt"}]}
    for how, xargs in (
        ("unsteered", {}),
        (arguments.policy, {"steering": arguments.policy}),
        ("inline", {"steering": json.dumps(edits)}),
    ):
        print(f"{how:>12}: {ask(client, arguments.question, xargs)}")


def ask(client: openai.OpenAI, question: str, xargs: dict[str, str]) -> str:
    """The answer, with how the request is told to be steered."""
    completion = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": question}],
        temperature=0,
        max_tokens=32,
        extra_body={"vllm_xargs": {**xargs, "steerscope_report": 1}},
    )
    (seen,) = completion.steerscope["completions"]
    scores = ", ".join(f"{each['signal']} {each['label']}" for each in seen["signals"])
    return f"{completion.choices[0].message.content.strip()!r}  ({scores})"


if __name__ == "__main__":
    main()
