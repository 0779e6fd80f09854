"""The server over an engine that computes nothing, in a process of its own.

python -m benchmarks.server_cpu.server PORT [PROFILE]
"""

import asyncio
import cProfile
import sys

from polymoe.client.client import AsyncEngineClient
from polymoe.config import EngineConfig
from polymoe.server.app import create_app
from polymoe.server.serve import HttpServer, bind, uvicorn_config
from polymoe.server.settings import ServerSettings


async def _serve(port: int) -> None:
    client = AsyncEngineClient(EngineConfig(bundle="none", max_waiting=1 << 20), "benchmarks.server_cpu.null_engine")
    settings = ServerSettings(port=port)
    app = create_app(client, settings)
    server = HttpServer(uvicorn_config(app, settings))
    await client.start()
    await app.state.server.encoder.warm_up()
    loop = asyncio.get_running_loop()

    def stop() -> None:
        loop.remove_reader(sys.stdin)
        server.should_exit = True

    loop.add_reader(sys.stdin, stop)
    try:
        with bind("127.0.0.1", port) as sock:
            await server.serve(sockets=[sock])
    finally:
        await client.shutdown()
        await app.state.server.encoder.close()


def main() -> None:
    profile = cProfile.Profile() if len(sys.argv) > 2 else None
    if profile is not None:
        profile.enable()
    asyncio.run(_serve(int(sys.argv[1])))
    if profile is not None:
        profile.disable()
        profile.dump_stats(sys.argv[2])


if __name__ == "__main__":
    main()
