"""A network that containers are put on."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from pytest_nsbox.errors import SpecError
from pytest_nsbox.model.addressing import parse_subnet

if TYPE_CHECKING:
    from pytest_nsbox.session.session import Session


class Network:
    """A network of its own: `name`, `subnet`, `gateway`. Made by a session or the fixture."""

    def __init__(self, session: Session, id: int, name: str, subnet: str, gateway: str) -> None:
        self._session = session
        self._owner = os.getpid()
        self.id = id
        self.name = name
        self.subnet = subnet
        self.gateway = gateway

    @classmethod
    def make(
        cls, session: Session, name: str | None, subnet: str | None, internet: bool
    ) -> Network:
        if name is not None and not isinstance(name, str):
            raise SpecError(f"network name {name!r} is not a string")
        number = session.network_number()
        checked = str(parse_subnet(subnet or f"10.89.{number}.0/24"))
        name = name or f"net{number}"
        reply, _ = session.request("network", name=name, subnet=checked, internet=internet)
        return cls(session, reply["id"], name, checked, reply["gateway"])

    def close(self) -> None:
        """Remove the network. A second time does nothing."""
        if self.id and os.getpid() == self._owner:
            id, self.id = self.id, 0
            self._session.request("remove_network", id=id)

    def __enter__(self) -> Network:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Network {self.name} {self.subnet}>"
