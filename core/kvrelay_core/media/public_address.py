"""Which network addresses belong to the public Internet: those that a stranger's URL may lead to.

Knows address ranges only; not the networks that this host is in. An operator's own public addresses count as public.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

Address = IPv4Address | IPv6Address

# Public by registration, or to some releases of Python, and special all the same.
_SPECIAL_V4 = (
    IPv4Network("192.0.0.0/24"),  # protocol assignments; clouds have put services there
    IPv4Network("192.88.99.0/24"),  # relays to 6to4
    IPv4Network("168.63.129.16/32"),  # a cloud's own services, as seen from its machines
)
_UNICAST_V6 = IPv6Network("2000::/3")
_SPECIAL_V6 = (
    IPv6Network("2001::/23"),  # protocol assignments; Teredo among them, which wraps an IPv4 address
    IPv6Network("2001:db8::/32"),  # documentation
    IPv6Network("2002::/16"),  # 6to4, which wraps an IPv4 address
    IPv6Network("3fff::/20"),  # documentation
)
# The prefix that gateways of IPv6-only networks are known by; behind it stands an IPv4 address. One that a network
# chose for itself looks like any other.
_NAT64 = IPv6Network("64:ff9b::/96")


def is_public(address: Address) -> bool:
    """Unicast, global, and not another way to write an address that is neither."""
    if isinstance(address, IPv4Address):
        special = any(address in network for network in _SPECIAL_V4)
        return address.is_global and not (address.is_multicast or address.is_reserved or special)
    if address.ipv4_mapped is not None:
        return is_public(address.ipv4_mapped)
    if address in _NAT64:
        return is_public(IPv4Address(int(address) & 0xFFFF_FFFF))
    special = any(address in network for network in _SPECIAL_V6)
    return address in _UNICAST_V6 and address.is_global and not (special or address.scope_id)
