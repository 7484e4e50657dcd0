"""The live server as an ASGI application, in Ray Serve or under any ASGI server, and with a folder that several machines share.

    pip install 'ray[serve]' && serve run examples.serve_ray:deployment      # a replica a GPU
    uvicorn --factory examples.serve_ray:app --ws-max-size 65536             # without Ray

MODEL, ROWS and SESSIONS of the environment say what is served, to how many callers at once, and where conversations are kept.
"""

import os

from starlette.applications import Starlette

from modeling_moshi_ttt.live.conversations import ConversationStore
from modeling_moshi_ttt.live.engine import Engine
from modeling_moshi_ttt.live.loading import load_model
from modeling_moshi_ttt.live.server import ServerSettings, create_app


def app() -> Starlette:
    """The application of one machine; it starts its engine, and keeps every conversation at its end."""
    name = os.environ.get("MODEL", "remembering")
    model, processor = load_model(name, None, "MODEL")
    store = ConversationStore(os.environ.get("SESSIONS", "sessions"), 3600, model, processor)
    engine = Engine(model, processor, int(os.environ.get("ROWS", "2")), store, name=name)
    return create_app(engine, ServerSettings(token=os.environ.get("TOKEN")))


try:
    from ray import serve
except ModuleNotFoundError:  # served without Ray
    deployment = None
else:
    deployment = serve.deployment(ray_actor_options={"num_gpus": 1})(serve.ingress(app)(type("Moshi", (), {}))).bind()
