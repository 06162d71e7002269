from __future__ import annotations

from ipaddress import ip_address

import pytest

from kvrelay_core.media.public_address import is_public

PUBLIC = [
    "8.8.8.8",
    "93.184.216.34",
    "2606:4700::1111",
    "2a00:1450:4001:80b::200e",
    "::ffff:8.8.8.8",
    "64:ff9b::808:808",
]
SPECIAL_V4 = [
    "0.0.0.0", "0.1.2.3", "10.0.0.1", "100.64.0.1", "100.100.100.200", "127.0.0.1", "127.255.255.254",
    "169.254.169.254", "172.16.0.1", "172.31.255.255", "192.0.0.192", "192.0.2.1", "192.88.99.1", "192.168.1.1",
    "198.18.0.1", "198.51.100.1", "203.0.113.1", "224.0.0.1", "239.255.255.250", "240.0.0.1", "255.255.255.255",
    "168.63.129.16",
]  # fmt: skip
SPECIAL_V6 = [
    "::", "::1", "::7f00:1", "100::1", "2001::1", "2001:0:5ef5:79fb::1", "2001:20::1", "2001:db8::1",
    "2002:7f00:1::1", "2002:808:808::1", "3fff::1", "5f00::1", "64:ff9b:1::808:808", "fc00::1", "fd00:ec2::254",
    "fe80::1", "fe80::1%eth0", "2606:4700::1111%eth0", "fec0::1", "ff02::1", "ff0e::1",
]  # fmt: skip


@pytest.mark.parametrize("text", PUBLIC)
def test_addresses_of_the_public_internet(text: str) -> None:
    assert is_public(ip_address(text))


@pytest.mark.parametrize("text", [*SPECIAL_V4, *SPECIAL_V6])
def test_special_addresses_are_not_public(text: str) -> None:
    assert not is_public(ip_address(text))


@pytest.mark.parametrize("text", SPECIAL_V4)
@pytest.mark.parametrize("wrapper", ["::ffff:{}", "64:ff9b::{}", "::{}"])
def test_no_wrapping_makes_them_public(text: str, wrapper: str) -> None:
    assert not is_public(ip_address(wrapper.format(text)))
