"""What a front door gets: everything behind it, in one value. `app` builds it; both doors use it."""

from dataclasses import dataclass

from peftserve.api.adapter_service import AdapterService
from peftserve.api.auth import Authenticator
from peftserve.api.generation import Engine, GenerationService
from peftserve.config import Config
from peftserve.metrics import Metrics
from peftserve.model.spec import ModelSpec
from peftserve.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """`model_name` is the base model's name in the API, `started_at` in seconds since the epoch.

    `generation.ready` says whether requests are accepted.
    """

    config: Config
    engine: Engine
    generation: GenerationService
    adapters: AdapterService
    auth: Authenticator
    metrics: Metrics
    tokenizer: Tokenizer
    spec: ModelSpec
    model_name: str
    started_at: float
