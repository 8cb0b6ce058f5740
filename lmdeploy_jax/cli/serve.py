"""`serve [api_server] [MODEL]`: answer over HTTP."""

from __future__ import annotations

import difflib
import signal
from contextlib import closing
from dataclasses import fields
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from absl import flags as absl_flags

from lmdeploy_jax.cli import proxy
from lmdeploy_jax.cli.engine_flags import add_engine_flags, engine_config
from lmdeploy_jax.cli.flags import PROGRAM, FlagSet, UsageError
from lmdeploy_jax.cli.lmdeploy_flags import add_lmdeploy_flags, check_lmdeploy_flags, ssl_files
from lmdeploy_jax.cli.option_flags import add_option_flags
from lmdeploy_jax.logs import set_level
from lmdeploy_jax.server.options import ServerOptions

if TYPE_CHECKING:
    from lmdeploy_jax.config import JaxEngineConfig
    from lmdeploy_jax.engine.io.frontend import Frontend
    from lmdeploy_jax.engine.prepare import PreparedModel

DEFAULT_MODEL = "tiny-chat"
SECTION = "Server"
SERVED = "api_server"
SUBCOMMANDS = {"proxy": proxy}
USAGE = f"serve [{SERVED}] [MODEL] [FLAGS], or serve proxy [FLAGS]"
ABOUT = f"""MODEL is a checkpoint folder, a hub id, or the output of `lmdeploy_jax convert`; without it the
embedded demonstration model {DEFAULT_MODEL}. Speaks OpenAI's protocol; /docs lists the routes."""


def define(flags: FlagSet) -> None:
    """The flags of the command."""
    flags.complete = lambda words: bool(_after_served(words))
    flags.add_config_file(SECTION)
    add_option_flags(flags, SECTION, ServerOptions)
    text, section = absl_flags.DEFINE_string, "Model"
    flags.add(section, text, "chat_template", None, "a built-in template's name, or a .json or .jinja file")
    flags.add(section, text, "log_level", "WARNING", "CRITICAL, ERROR, WARNING, INFO, REQUEST or DEBUG")
    flags.add(section, absl_flags.DEFINE_integer, "max_log_len", None, "characters of a logged prompt")
    add_engine_flags(flags)
    add_lmdeploy_flags(flags, server=True)


def run(flags: FlagSet, args: list[str]) -> int:
    """Open the model and serve it until the process is told to end."""
    model = _model(args)
    given = {field.name: flags[field.name] for field in fields(ServerOptions)}
    options = ServerOptions(**given | ssl_files(flags))
    config = engine_config(flags)
    set_level(flags["log_level"])
    check_lmdeploy_flags(flags)
    return _follow(model, config) if config.node_rank else _serve(model, config, options, flags)


def _follow(model: str, config: JaxEngineConfig) -> int:
    """Another node answers; this one computes its share."""
    from lmdeploy_jax.engine.core.follower import follow

    follow(model, config)
    return 0


def _serve(model: str, config: JaxEngineConfig, options: ServerOptions, flags: FlagSet) -> int:
    from lmdeploy_jax.engine import garbage_collection
    from lmdeploy_jax.engine.prepare import prepare
    from lmdeploy_jax.server.http.sockets import bind
    from lmdeploy_jax.server.run import Server, check
    from lmdeploy_jax.server.service import Service

    prepared = prepare(model, config, flags["chat_template"])
    check(options, prepared)
    sockets = bind(options)
    signal.signal(signal.SIGTERM, _exit)
    with closing(_frontend(prepared, flags)) as frontend:
        service = Service(frontend, options, model)
        garbage_collection.freeze()
        server = Server(service, lambda url: print(f"Serving {service.models[0]} at {url}", flush=True))
        server.run(sockets)
    return 1 if server.lost_a_node else 0


def _model(args: list[str]) -> str:
    """The model that is named. LMDeploy's word for what is served may come before it."""
    words = _after_served(args)
    if words and (words[0] == "gradio" or difflib.get_close_matches(words[0], [SERVED])):
        raise UsageError(f"serve does {SERVED} and proxy, not {words[0]}; usage: {PROGRAM} {USAGE}")
    if len(words) > 1:
        raise UsageError(f"usage: {PROGRAM} {USAGE}; serve takes one model, but was given {words}.")
    return words[0] if words else DEFAULT_MODEL


def _after_served(words: list[str]) -> list[str]:
    return words[1:] if words and words[0].replace("-", "_") == SERVED else words


def _frontend(model: PreparedModel, flags: FlagSet) -> Frontend:
    """Over engines in processes of their own, so that HTTP and the engine's thread share no interpreter."""
    from lmdeploy_jax.engine.io.frontend import Frontend
    from lmdeploy_jax.engine.process.replicas import open_remote

    engine = open_remote(model.folder, model.config)
    return Frontend.from_engine(engine, model, flags["max_log_len"])


def _exit(number: int, _: FrameType | None) -> NoReturn:
    """Ends as the signal would, but not before the engine's process has been closed."""
    raise SystemExit(128 + number)
