"""Which address a container gets: the same one in every run."""

from __future__ import annotations

import ipaddress

from pytest_nsbox.errors import SpecError

DEFAULT_SUBNET = "172.27.0.0/16"


class Subnet:
    """An IPv4 subnet, its IPv6 twin, and the addresses given out of it.

    The gateway has the first address, containers the following, always the lowest free one, so
    that the first container of every test has the same. The IPv6 twin is a unique local /64
    (RFC 4193) made from the IPv4 network.
    """

    def __init__(self, subnet: str) -> None:
        self.ipv4 = parse_subnet(subnet)
        high, low = divmod(int(self.ipv4.network_address), 1 << 16)
        self.ipv6 = ipaddress.IPv6Network(f"fd6e:7362:{high:x}:{low:x}::/64")
        self._used: set[int] = set()
        self._texts: dict[int, str] = {}  # of the addresses that have been asked for
        self._next = 2

    def __str__(self) -> str:
        return str(self.ipv4)

    @property
    def gateway(self) -> str:
        return str(self.ipv4[1])

    @property
    def gateway6(self) -> str:
        return str(self.ipv6[1])

    def take(self) -> int:
        """The lowest free host number. Raises SpecError when the subnet is full."""
        number = self._next
        while number in self._used:
            number += 1
        if number >= self.ipv4.num_addresses - 1:
            raise SpecError(
                f"subnet {self.ipv4} is too small for {len(self._used) + 1} containers: "
                f"it has room for {max(self.ipv4.num_addresses - 3, 0)}; "
                "choose a shorter prefix (--nsbox-subnet, or subnet= of the network)"
            )
        self._used.add(number)
        self._next = number + 1
        return number

    def give_back(self, number: int) -> None:
        self._used.discard(number)
        self._next = min(self._next, number)

    def ip(self, number: int) -> str:
        if number not in self._texts:  # a thousand neighbours are told by it a thousand times
            self._texts[number] = str(self.ipv4[number])
        return self._texts[number]

    def ip6(self, number: int) -> str:
        return str(self.ipv6[number])


def mac(ip: str) -> str:
    """A locally administered MAC that follows from the IPv4 address."""
    return "02:42:" + ":".join(f"{byte:02x}" for byte in ipaddress.IPv4Address(ip).packed)


def parse_subnet(subnet: object) -> ipaddress.IPv4Network:
    """An IPv4 network with room for a gateway and a container. Raises SpecError."""
    try:
        network = ipaddress.IPv4Network(str(subnet))
    except ValueError as error:
        raise SpecError(
            f"subnet {subnet!r}: {error}; a subnet is an IPv4 network like {DEFAULT_SUBNET!r}"
        ) from None
    if network.num_addresses < 4:
        raise SpecError(
            f"subnet {subnet!r} is too small: a gateway and a container need a /30 or larger"
        )
    return network
