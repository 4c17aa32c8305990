"""Submit a prompt and say what ComfyUI told a listening page; run with ComfyUI's Python: comfy_listen.py PORT < graph.json.

Prints {"kinds": {message: count}, "previews": n, "progress": [[value, max], ...], "error": text}. With a second argument N,
the run is interrupted after N progress messages.
"""

import asyncio
import json
import sys
from collections import Counter

import aiohttp


async def main(port: int, interrupt_after: int) -> None:
    url, kinds, progress, previews, error = f"http://127.0.0.1:{port}", Counter(), [], 0, ""
    graph = json.load(sys.stdin)
    async with aiohttp.ClientSession() as session, session.ws_connect(f"{url}/ws?clientId=listener") as socket:
        await session.post(f"{url}/prompt", json={"prompt": graph, "client_id": "listener"})
        async for message in socket:
            if message.type is aiohttp.WSMsgType.BINARY:
                previews += 1
                continue
            told = json.loads(message.data)
            kinds[told["type"]] += 1
            if told["type"] == "progress":
                progress.append([told["data"]["value"], told["data"]["max"]])
                if interrupt_after and len(progress) == interrupt_after:
                    await session.post(f"{url}/interrupt", json={})
            error = told["data"].get("exception_message", error)
            if told["type"] in ("execution_success", "execution_error", "execution_interrupted"):
                break
    print(json.dumps({"kinds": kinds, "previews": previews, "progress": progress, "error": error}))


asyncio.run(main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0))
