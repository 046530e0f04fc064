"""The texts of /etc/hosts and /etc/resolv.conf (hosts(5), resolv.conf(5))."""

from __future__ import annotations

import functools
import ipaddress
from collections.abc import Iterable, Mapping

HOSTS, HOSTNAME, RESOLV_CONF = "/etc/hosts", "/etc/hostname", "/etc/resolv.conf"
# the first is ours; the others are what users of Docker and Testcontainers have written down
OF_THE_HOST = "host.nsbox.internal host.docker.internal host.testcontainers.internal"
_SYSTEMD_UPSTREAM = "/run/systemd/resolve/resolv.conf"


def hosts(
    names: Iterable[tuple[str, str]], neighbours: Iterable[str], extra: Mapping[str, str]
) -> str:
    """Loopback, then address and name pairs, then whole lines, then the user's own."""
    lines = [
        "127.0.0.1\tlocalhost",
        "::1\tlocalhost ip6-localhost ip6-loopback",
    ]
    lines += [f"{address}\t{name}" for address, name in names]
    lines += neighbours
    lines += [f"{address}\t{name}" for name, address in extra.items()]
    return "\n".join(lines) + "\n"


def resolv_conf(dns: tuple[str, ...] | None, network: str, stand_in: str | None = None) -> str:
    """The name servers a container asks: those given, or the host's that it can reach, or where
    there are none the uplink's `stand_in` for them."""
    if dns is not None:
        return "".join(f"nameserver {address}\n" for address in dns)
    if network in ("none", "isolated"):
        return "# this network has no way out, so no name server either\n"
    # a stub on the host's loopback is out of a container's reach; it names those it asks itself
    for path in (RESOLV_CONF, _SYSTEMD_UPSTREAM):
        kept = _kept(_read(path), network == "host")
        if kept is not None:
            return kept
    if stand_in is not None:
        return f"nameserver {stand_in}\n"
    return "# the host's name servers are on its loopback, out of reach from here; set dns=\n"


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def _server(line: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    words = line.split()
    if len(words) < 2 or words[0] != "nameserver":
        return None
    try:
        return ipaddress.ip_address(words[1].partition("%")[0])
    except ValueError:
        return None


@functools.lru_cache(maxsize=2)
def _kept(text: str, host: bool) -> str | None:
    """The lines that mean something inside, the host's network apart, whose uplink carries IPv4
    only; None where none of the servers is in reach there."""
    lines, reachable = [], host
    for line in text.splitlines():
        server = _server(line)
        usable = server is not None and (host or (server.version == 4 and not server.is_loopback))
        if usable or not line.startswith("nameserver"):
            lines.append(line)
        reachable = reachable or usable
    return "\n".join(lines) + "\n" if reachable else None
