"""`serve proxy`: one address for several servers."""

from __future__ import annotations

from dataclasses import fields

from absl import flags as absl_flags

from lmdeploy_jax.cli.flags import PROGRAM, FlagSet, UsageError
from lmdeploy_jax.cli.option_flags import add_option_flags
from lmdeploy_jax.logs import set_level
from lmdeploy_jax.proxy.options import ProxyOptions

SECTION, LMDEPLOY = "Proxy", "LMDeploy's own"
USAGE = "serve proxy [FLAGS]"
ABOUT = f"""Passes requests on to servers that are started with `{PROGRAM} serve api_server
--proxy-url URL`, named by --nodes or added by POST /nodes/add: every route, as it comes, streams too. A
server that refuses a request or goes before its answer has begun is replaced by another."""
HYBRID = "Hybrid"


def define(flags: FlagSet) -> None:
    """The flags of the command."""
    flags.add_config_file(SECTION)
    add_option_flags(flags, SECTION, ProxyOptions)
    flags.add(
        SECTION, absl_flags.DEFINE_string, "log_level", "WARNING", "CRITICAL, ERROR, WARNING, INFO or DEBUG"
    )
    text, switch = absl_flags.DEFINE_string, absl_flags.DEFINE_boolean
    flags.add(
        LMDEPLOY, text, "serving_strategy", HYBRID, "Hybrid alone: prefill and decode run in one engine"
    )
    flags.add(LMDEPLOY, switch, "disable_cache_status", False, "has no meaning here: no file keeps the nodes")
    flags.complete = lambda words: True


def run(flags: FlagSet, args: list[str]) -> int:
    """Serve until the process is told to end."""
    if args:
        raise UsageError(f"usage: {PROGRAM} {USAGE}; serve proxy takes no arguments, but was given {args}.")
    if flags["serving_strategy"] != HYBRID:
        raise UsageError(
            f"--serving-strategy {flags['serving_strategy']} is not supported: prefill and decode run in one "
            f"engine; leave it out, or give {HYBRID}."
        )
    options = ProxyOptions(**{field.name: flags[field.name] for field in fields(ProxyOptions)})
    set_level(flags["log_level"])

    from lmdeploy_jax.proxy.run import serve

    serve(options, lambda url: print(f"Proxy at {url}", flush=True))
    return 0
