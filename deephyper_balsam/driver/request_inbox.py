"""What people ask of a search through Balsam, as its driver reads it with each sign of life."""

from __future__ import annotations

from collections.abc import Callable

from deephyper_balsam.store.driver_requests import STOP, DriverRequest, answer_request, read_requests
from deephyper_balsam.store.gateway import Gateway
from deephyper_balsam.store.lease import LeaseKeeper


class RequestInbox:
    """The requests to one search.

    Parameters
    ----------
    gateway, search, lease, clock
        Balsam, the search's name, what makes this driver the only one, and the time (epoch).
    """

    def __init__(self, gateway: Gateway, search: str, lease: LeaseKeeper, clock: Callable[[], float]) -> None:
        self._gateway, self._search, self._lease, self._clock = gateway, search, lease, clock
        self._seen: set[int] = set()

    def read_all(self) -> list[DriverRequest]:
        """Return all there are, the oldest first; one to stop an earlier driver is answered."""
        requests = read_requests(self._gateway, self._search)
        self._seen = {request.id for request in requests}
        for request in requests:
            if request.what == STOP and request.handled is None and request.id < self._lease.lease.id:
                did = "the driver that it was meant for had ended before it"
                answer_request(self._gateway, request, self._clock(), did)
        return requests

    def read_new(self) -> list[DriverRequest]:
        """Leave a sign of life now and then; what came since the last call.

        Raises
        ------
        TakenOverError
            Another driver has taken over.
        """
        self._lease.beat()
        news = [DriverRequest.read(row) for row in self._lease.news if row["tags"]["kind"] == "request"]
        self._lease.news.clear()
        new = [request for request in news if request.handled is None and request.id not in self._seen]
        self._seen.update(request.id for request in new)
        return new
