from __future__ import annotations

import json
import urllib.error
import urllib.request

import openai
import pytest
from steerscope.client import Client
from steerscope.demo.live.server import MODEL_NAME


class Http:
    """Plain HTTP to the demo server, for what the client library would hide."""

    def __init__(self, base_url: str) -> None:
        self.base_url = base_url

    def post(self, path: str, body: dict) -> tuple[int, dict]:
        request = urllib.request.Request(
            self.base_url + path,
            data=json.dumps(body).encode(),
            headers={"content-type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def chat(self, question: str, flag: object = None, **body: object) -> tuple[int, dict]:
        if flag is not None:
            body["vllm_xargs"] = {"steering": flag}
        message = {"role": "user", "content": question}
        return self.post(
            "/v1/chat/completions",
            {
                "model": MODEL_NAME,
                "messages": [message],
                "temperature": 0,
                "max_tokens": 32,
                "return_token_ids": True,
                **body,
            },
        )

    def say(self, question: str, flag: object = None, **body: object) -> str:
        status, reply = self.chat(question, flag, **body)
        assert status == 200, reply
        return reply["choices"][0]["message"]["content"].strip()


@pytest.fixture(scope="session")
def http(demo_server) -> Http:
    return Http(demo_server.base_url)


@pytest.fixture(scope="session")
def openai_client(demo_server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{demo_server.base_url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="session")
def client(demo_server) -> Client:
    return Client(demo_server.grpc_address)
