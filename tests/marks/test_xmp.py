"""XMP packets: what is written is read again, whatever the texts; a stranger's packet can do no harm."""

import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowvram.marks import xmp
from lowvram.marks.origin import COMPOSITE, GENERATED, Origin, plain

_HEAD = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#" '
    'xmlns:i="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" xmlns:xmp="http://ns.adobe.com/xap/1.0/">'
)
_TAIL = "</rdf:RDF></x:xmpmeta>"


@given(recipe=st.text(), weights=st.text(max_size=50))
def test_texts_come_back(recipe: str, weights: str) -> None:
    found = xmp.read(xmp.write(Origin(recipe=recipe, weights=weights, seed=7, source=COMPOSITE)))
    assert (found["source"], found["seed"]) == (COMPOSITE, "7")
    for name, text in (("recipe", recipe), ("weights", weights)):
        expected = plain(text).replace("\r\n", "\n").replace("\r", "\n").strip()
        assert found.get(name, "") == expected


@pytest.mark.parametrize("text", ["&" * 10_000, "😀" * 10_000, "]]>" * 5_000, '<a b="c">' * 2_000])
def test_the_longest_texts_still_fit_a_jpeg(text: str) -> None:
    packet = xmp.write(Origin(recipe=text, weights=text, checkpoint=text))
    assert len(packet) < 64_000
    ElementTree.fromstring(packet.decode().removeprefix("\ufeff"))  # another parser's word that it is XML
    assert xmp.read(packet)["recipe"] == plain(text)


@pytest.mark.parametrize(
    "body",
    [
        f'<rdf:Description i:DigitalSourceType="{GENERATED}" xmp:CreatorTool="Other 1"/>',
        f'<rdf:Description xmp:CreatorTool="Other 1"><i:DigitalSourceType rdf:resource="{GENERATED}"/>'
        "</rdf:Description>",
        f"<rdf:Description><i:DigitalSourceType> {GENERATED}\n</i:DigitalSourceType>"
        "<xmp:CreatorTool>Other 1</xmp:CreatorTool></rdf:Description>",
    ],
)
def test_every_way_in_which_others_write_it(body: str) -> None:
    packet = (_HEAD + body + _TAIL).encode()
    assert xmp.read(packet) == {"source": GENERATED, "tool": "Other 1"}
    assert xmp.read(packet + b"\x00" * 8) == xmp.read(packet)


@pytest.mark.parametrize(
    ("packet", "message"),
    [
        (b'<!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]><x>&b;</x>', "document type"),
        (b'<!DOCTYPE x SYSTEM "file:///etc/passwd"><x/>', "document type"),
        (b"<x>&undefined;</x>", "no XML"),
        (b"<x><y></x>", "no XML"),
        (b"", "no XML"),
        (b"\xff\xfe\x00", "no XML"),
        (b" " * (xmp.MOST_BYTES + 1), "bytes, over"),
    ],
)
def test_a_hostile_packet_is_refused(packet: bytes, message: str) -> None:
    with pytest.raises(xmp.BadPacketError, match=message):
        xmp.read(packet)


def test_deep_nesting_and_long_values_are_bounded() -> None:
    deep = b"<x>" * 20_000 + b"</x>" * 20_000
    assert xmp.read(deep) == {}
    body = "<rdf:Description><xmp:CreatorTool>" + "x" * 100_000 + "</xmp:CreatorTool></rdf:Description>"
    assert len(xmp.read((_HEAD + body + _TAIL).encode())["tool"]) == 10_000
