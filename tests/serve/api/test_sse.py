"""Server-sent events without a server: what is sent, in which frames, and what is closed at the end."""

import asyncio
import json

import pytest

from serve.api.sse import EventStream, sent_event
from serve.protocol import Refused


class Stream:
    """Runs an `EventStream` over events; `body` holds what it sent, `closed` which generators it closed."""

    def __init__(self, events):
        self.messages, self.closed = [], []
        self.scope = {"state": {"log_fields": {}, "request_id": "req_1"}}
        asyncio.run(self._run(events))

    async def _generator(self, name, events):
        try:
            for event in events:
                if isinstance(event, Exception):
                    raise event
                yield event
        finally:
            self.closed.append(name)

    async def _run(self, events):
        source = self._generator("source", [{}])
        await anext(source)
        stream = EventStream(self._generator("events", events), source, {"x-ppcl-variant": "all"}, 60.0)
        await stream(self.scope, self._receive, self._send)

    async def _receive(self):
        await asyncio.sleep(3600)
        return {"type": "http.disconnect"}

    async def _send(self, message):
        self.messages.append(message)

    @property
    def body(self):
        return b"".join(message.get("body", b"") for message in self.messages).decode()


def test_an_event_is_a_type_and_one_line_of_json():
    assert sent_event({"type": "x", "text": "a\nb"}) == 'event: x\ndata: {"type":"x","text":"a\\nb"}\n\n'


def test_events_are_sent_in_order_and_both_generators_are_closed():
    stream = Stream([{"type": "first"}, {"type": "second"}])
    assert stream.body == sent_event({"type": "first"}) + sent_event({"type": "second"})
    assert stream.messages[0]["status"] == 200 and stream.messages[-1]["more_body"] is False
    assert (b"x-ppcl-variant", b"all") in stream.messages[0]["headers"]
    assert set(stream.closed) == {"events", "source"}


@pytest.mark.parametrize(
    ("error", "code"),
    [(Refused(503, "server_error", "busy", "out_of_memory"), "out_of_memory"), (ValueError("x"), "internal_error")],
)
def test_an_error_is_the_last_event_and_is_logged(error, code):
    stream = Stream([{"type": "first"}, error])
    first, last = stream.body.strip().split("\n\n")
    assert first == sent_event({"type": "first"}).strip()
    assert json.loads(last.split("data: ")[1])["error"]["code"] == code
    assert stream.scope["state"]["log_fields"] == {"error": code}
    assert stream.messages[-1]["more_body"] is False
