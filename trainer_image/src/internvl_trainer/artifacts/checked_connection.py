"""HTTPS connections to addresses that were checked: link-local ones never, private ones only where it is permitted.

The check and the connection use one look-up of the name, so that a name server cannot give another address in between.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Iterator

from internvl_api.constants import ENV_ALLOW_PRIVATE_ADDRESSES
from urllib3.connection import HTTPSConnection
from urllib3.connectionpool import HTTPSConnectionPool
from urllib3.exceptions import ConnectTimeoutError, NameResolutionError, NewConnectionError

from internvl_trainer.errors import UserError

ENV_ALLOW_PRIVATE = ENV_ALLOW_PRIVATE_ADDRESSES
Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


def permit_private_addresses(permitted: bool) -> None:
    """Set whether this process and its children may connect to private and loopback addresses."""
    os.environ[ENV_ALLOW_PRIVATE] = "true" if permitted else "false"


def refusal(text: str) -> str | None:
    """Why an IP address must not be connected to, or None."""
    address = _real(ipaddress.ip_address(text.partition("%")[0]))
    if address.is_link_local:
        return "a link-local address, where a cloud's metadata server is"
    if address.is_multicast or address.is_unspecified:
        return "no address of a server"
    if not address.is_global and os.environ.get(ENV_ALLOW_PRIVATE) != "true":
        kind = "a loopback" if address.is_loopback else "a private"
        return f"{kind} address; an administrator permits those with allowPrivateAddresses"
    return None


def _real(address: Address) -> Address:
    """The IPv4 address that an IPv6 address leads to, else the address itself."""
    if isinstance(address, ipaddress.IPv6Address):
        embedded = address.ipv4_mapped or address.sixtofour
        if embedded is None and address in _NAT64:
            embedded = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        return embedded or address
    return address


class CheckedConnection(HTTPSConnection):
    """Connects only to addresses without a `refusal`; TLS still verifies the name."""

    def _new_conn(self) -> socket.socket:
        name = self._dns_host
        failure: Exception | None = None
        try:
            for address in self._permitted(name.strip("[]")):
                self._dns_host = address
                try:
                    return super()._new_conn()
                except (NewConnectionError, ConnectTimeoutError) as error:
                    failure = error
        finally:
            self._dns_host = name
        assert failure is not None  # _permitted gives an address or raises
        raise failure

    def _permitted(self, name: str) -> Iterator[str]:
        try:
            found = socket.getaddrinfo(name, self.port, type=socket.SOCK_STREAM)
        except socket.gaierror as error:
            raise NameResolutionError(name, self, error) from error
        addresses = dict.fromkeys(str(entry[4][0]) for entry in found)
        permitted = [address for address in addresses if refusal(address) is None]
        if not permitted:
            address = next(iter(addresses))
            place = name if name == address else f"{name} ({address})"
            raise UserError("AddressRefused", f"{place} is {refusal(address)}", "https://")
        yield from permitted


class CheckedPool(HTTPSConnectionPool):
    """A pool of checked connections."""

    ConnectionCls = CheckedConnection
