"""A page in the browser to re-pose birds and to compose plates: ``python -m nabla_jax.app``.

    python -m nabla_jax.app                                                      # the embedded base and adapter
    python -m nabla_jax.app --config configs/omk_fill.py --adapter runs/omk_fill

Needs ``pip install 'nabla_jax[app]'``. Everything that can be wrong with the settings is said before weights load.
"""

import argparse
import importlib.util
import ipaddress
import socket
from collections.abc import Sequence

from nabla_jax import config as configs
from nabla_jax import runs
from nabla_jax.errors import UserError

DEFAULT_ADAPTER = "asset:toy-omk-fill"


def main(argv: Sequence[str]) -> None:
    """The command."""
    options = parse(argv)
    config = None if options.config is None else configs.load(options.config)
    if config is not None:
        configs.check_inputs(config, "generate", [])
    adapters = options.adapter or ([] if config is not None else [DEFAULT_ADAPTER])
    if not adapters:
        raise UserError("--adapter: found none, expected at least one beside --config")
    if importlib.util.find_spec("gradio") is None:
        raise UserError("the app needs gradio, which is not installed: pip install 'nabla_jax[app]'")
    check_address(options.host, options.port)
    # Imported after the checks: a mistake in the settings is answered before any framework loads.
    from nabla_jax.app import page, work

    studio = work.Studio(config, work.read_adapters(adapters, config))
    studio.reposer(next(iter(studio.adapters)))
    page.serve(studio, options.host, options.port, options.max_upload_mb)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The settings. Raises UserError for a port or a size out of range."""
    parser = argparse.ArgumentParser(description="Re-poses birds in the browser.", allow_abbrev=False)
    add = parser.add_argument
    add("--config", metavar="FILE[:arg]", help="base and settings; default: the embedded base")
    add(
        "--adapter",
        action="append",
        default=[],
        metavar="PATH",
        help=f"safetensors file, training run or asset:NAME; repeatable (default without --config: {DEFAULT_ADAPTER})",
    )
    add("--host", default="127.0.0.1", help="address to listen on (default: %(default)s, this machine alone)")
    add("--port", type=int, default=7860, help="(default: %(default)s)")
    add("--max_upload_mb", type=float, default=20.0, help="largest file that is taken (default: %(default)s)")
    options = parser.parse_args(argv)
    if not 1 <= options.port <= 65535:
        raise UserError(f"--port: found {options.port}, expected 1 to 65535")
    if not 0 < options.max_upload_mb <= 1000:
        raise UserError(f"--max_upload_mb: found {options.max_upload_mb:g}, expected more than 0 and at most 1000")
    return options


def check_address(host: str, port: int) -> None:
    """Raises UserError if nothing can listen there; prints a line where other machines can reach it."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise UserError(f"--host: found {host!r}, expected an address of this machine ({error})") from error
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            raise UserError(f"--host {host} --port {port}: cannot be listened on: {error.strerror}") from error
    if not ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback:
        print(f"--host {host}: whoever reaches this machine can use the app: it asks for no password", flush=True)


if __name__ == "__main__":
    runs.run_main(main)
