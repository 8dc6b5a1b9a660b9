"""Run in the pod's network: `visit.py SECRETS`. Prints as JSON what a user, Prometheus and an
operator of the pod find there.
"""

import http.client
import json
import ssl
import sys
from pathlib import Path

from steerscope.client import Client
from steerscope.client.channel import Credentials

SECRETS = Path(sys.argv[1])
TOKEN = (SECRETS / "admin.token").read_text().strip()
REQUEST_ID = "from-the-visitor"


def vllm(path, body=None):
    connection = http.client.HTTPConnection("localhost", 8000, timeout=60)
    headers = {"Content-Type": "application/json", "X-Request-Id": REQUEST_ID}
    payload = None if body is None else json.dumps(body)
    connection.request("POST" if body else "GET", path, payload, headers)
    return connection.getresponse().status


def hub(path, token=None):
    context = ssl.create_default_context(cafile=SECRETS / "ca.crt")
    connection = http.client.HTTPSConnection("localhost", 9464, timeout=10, context=context)
    connection.request("GET", path, headers={"Authorization": f"Bearer {token}"} if token else {})
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def policies():
    proof = Credentials(ca=SECRETS / "ca.crt", token=TOKEN)
    with Client("localhost:50051", proof) as client:
        return [policy.name for policy in client.list_policies()]


completion = {"model": "steerscope-demo", "prompt": "Who is", "max_tokens": 4}
steered = {**completion, "vllm_xargs": {"steering": "force-known"}}
report = f"/v1/steerscope/requests/cmpl-{REQUEST_ID}-0"
print(
    json.dumps(
        {
            "steered": vllm("/v1/completions", steered),
            "vllm metrics": vllm("/metrics"),
            "hub metrics": "steerscope_build_info" in hub("/metrics")[1],
            "report": hub(report)[0],
            "report with token": hub(report, TOKEN)[0],
            "policies": policies(),
        }
    )
)
