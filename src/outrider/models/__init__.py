"""Models: the only place that imports transformers."""

from outrider.models.cache import KVCache, LayerShape
from outrider.models.language_model import LanguageModel, ModelSpec, Output
from outrider.models.loading import check_pair, load_model, model_name, wrap

__all__ = ["KVCache", "LanguageModel", "LayerShape", "ModelSpec", "Output", "check_pair", "load_model", "model_name", "wrap"]
