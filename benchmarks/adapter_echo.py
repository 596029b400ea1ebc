"""An echo through our own MQTT adapter: `python -m benchmarks.adapter_echo PORT STATE_TOPIC ACTION_TOPIC`.

The distance from the C echo is what the adapter costs; the distance to the agent is what answering costs.
"""

from __future__ import annotations

import sys

from protocol.link import Broker, Link, Message


def main() -> None:
    """Answer each message with the same bytes until ended."""
    port, state, action = sys.argv[1:]

    def ready(_packet: int) -> None:
        sys.stdout.write("ready\n")
        sys.stdout.flush()

    def answer(message: Message) -> None:
        link.publish(action, message.payload, qos=message.qos)

    link = Link(Broker(port=int(port)), "bench-adapter-echo", on_message=answer, on_subscribed=ready)
    link.subscribe((state, 1))
    while True:
        link.turn(1.0)


if __name__ == "__main__":
    main()
