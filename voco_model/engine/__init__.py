"""``TwoPassEngine``: serves questions about images, reading each image once."""

from voco_model.engine.engine import TwoPassEngine
from voco_model.engine.request import Answer, Request, RequestError, Sampling
from voco_model.engine.scheduler import EngineStats
from voco_model.engine.ticket import Ticket

__all__ = [
    "Answer",
    "EngineStats",
    "Request",
    "RequestError",
    "Sampling",
    "Ticket",
    "TwoPassEngine",
]
