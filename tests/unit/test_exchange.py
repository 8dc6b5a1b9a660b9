"""Reports are put into responses as they are; of what vLLM wrote no byte changes."""

import asyncio
import json

import pytest
from steerscope.steering.exchange import ExchangeMiddleware, current_exchange

REPORT = b'{"name":"requests/r","share":0.10000000149011612}'


def answered(content_type, *bodies, reports=(REPORT,)):
    """What a client gets of an app's response, after it asked for so many reports."""

    async def app(scope, receive, send):
        for told in reports:
            current_exchange().reports.append(lambda told=told: asyncio.sleep(0, told))
        headers = [(b"content-type", content_type), (b"content-length", b"1")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for i, body in enumerate(bodies):
            more = i + 1 < len(bodies)
            await send({"type": "http.response.body", "body": body, "more_body": more})

    sent = []

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "path": "/v1/completions", "method": "POST", "headers": []}
    asyncio.run(ExchangeMiddleware(app, lambda accept: None)(scope, None, send))
    start, *rest = sent
    return dict(start["headers"]), b"".join(message["body"] for message in rest)


def test_a_reply_keeps_its_bytes():
    reply = b'{"id": "cmpl-1", "score": 1.50, "text": "\\u00e9"}'
    headers, body = answered(b"application/json", reply[:9], reply[9:])
    assert body == reply[:-1] + b',"steerscope":' + REPORT + b"}"
    assert headers[b"content-length"] == str(len(body)).encode()


def test_of_several_prompts_all_are_told():
    _, body = answered(b"application/json", b'{"id":1}\n', reports=(REPORT, b'{"name":"s"}'))
    assert json.loads(body)["steerscope"]["reports"] == [json.loads(REPORT), {"name": "s"}]


@pytest.mark.parametrize("apart", [True, False])
def test_a_stream_has_it_in_a_chunk_before_the_end(apart):
    chunk, done = b'data: {"id":"c","choices":[{"text":"x"}]}\n\n', b"data: [DONE]\n\n"
    bodies = (chunk, done) if apart else (chunk + done,)
    _, body = answered(b"text/event-stream", *bodies)
    before, added, after = body.split(b"\n\n", 2)
    assert (before + b"\n\n", after) == (chunk, done)
    told = json.loads(added.removeprefix(b"data: "))
    assert told == {"id": "c", "choices": [], "steerscope": json.loads(REPORT)}


def test_a_stream_without_a_last_mark_has_it_as_an_event():
    event = b'event: message_stop\ndata: {"type":"message_stop"}\n\n'
    _, body = answered(b"text/event-stream; charset=utf-8", event)
    assert body == event + b"event: steerscope\ndata: " + REPORT + b"\n\n"
