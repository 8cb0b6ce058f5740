"""Ray Serve: as many replicas of a server as its queue asks for, behind one address (the extra `ray`).

serve run lmdeploy_jax.ray_serve:build_app model=MODEL max_replicas=4
"""

from lmdeploy_jax.ray_serve.app import RayOptions, build_app

__all__ = ["RayOptions", "build_app"]
