"""Our own client with asyncio: a guard that steers requests when a feature gets strong.

It watches the activations of every request as they are computed. Once the feature is above a
bound, the request is steered by a policy from its next token on.

    python async_client.py --feature unknown_entity --above 20 --policy force-unknown
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib

from steerscope.client import AsyncClient, CallError


async def main() -> None:
    """Guard until enough requests were steered."""
    arguments = _arguments()
    async with AsyncClient(arguments.address, timeout=5.0) as client:
        await client.get_policy(arguments.policy)  # is there such a policy?
        print(f"guarding: {arguments.feature} above {arguments.above:g}", flush=True)
        guarding = guard(
            client, arguments.feature, arguments.above, arguments.policy, arguments.max_steers
        )
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(guarding, arguments.seconds)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--address", default="127.0.0.1:50051")
    parser.add_argument("--feature", default="unknown_entity")
    parser.add_argument("--above", type=float, default=20.0)
    parser.add_argument("--policy", default="force-unknown")
    parser.add_argument("--max-steers", type=int, help="end after so many")
    parser.add_argument("--seconds", type=float, help="end after so long")
    return parser.parse_args()


async def guard(
    client: AsyncClient, feature: str, above: float, policy: str, max_steers: int | None
) -> None:
    """Steer each request once, as soon as the feature was above the bound at a token."""
    steered: set[str] = set()
    async with client.watch_activations(features=[feature]) as events:
        async for event in events:
            top = max((value for track in event.features for value in track.activations), default=0)
            if top <= above or event.request in steered or event.finished:
                continue
            steered.add(event.request)
            await steer(client, event.request.removeprefix("requests/"), policy, top)
            if len(steered) == max_steers:
                return


async def steer(client: AsyncClient, request_id: str, policy: str, top: float) -> None:
    """Steer a request; it may have ended in the meantime."""
    try:
        told = await client.steer_request(request_id, policy=policy, ttl=0.1)
    except CallError as error:
        print(f"{request_id}: not steered: {error}", flush=True)
        return
    where = ", ".join(f"token {each.first_position}" for each in told.sequences) or "no token"
    print(f"{request_id}: {top:.1f}; {policy} from {where} on", flush=True)


if __name__ == "__main__":
    asyncio.run(main())
