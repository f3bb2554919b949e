"""The frozen prefix of an adapted model, computed once: what lies below its lowest adapter, kept on disk."""

from shared.cache.prefix import FrozenPrefix as FrozenPrefix
from shared.cache.settings import Cache as Cache
from shared.cache.span import Span as Span
from shared.cache.span import span as span
