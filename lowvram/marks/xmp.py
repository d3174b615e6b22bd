"""XMP packets (ISO 16684-1): written with the IPTC digital source type, and read from files of any maker."""

from xml.parsers import expat
from xml.sax.saxutils import escape

from lowvram.marks.origin import Origin

_RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
_XMP = "http://ns.adobe.com/xap/1.0/"
_IPTC = "http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
OWN = "urn:x-lowvram:origin:1/"

_SOURCE, _TOOL = "DigitalSourceType", "CreatorTool"
MOST_BYTES = 4 * 2**20  # that are read: photographs with edits in them have some hundred thousand
_MOST_TEXT = 10_000  # characters of a value


class BadPacketError(ValueError):
    """A packet is too long, or no XML, or has a document type: that is how XML is made to grow without end."""


def write(origin: Origin) -> bytes:
    """The packet for an image, UTF-8; under 64,000 bytes, so that a JPEG takes it in one segment."""
    own = "".join(f"\n   <lowvram:{name}>{escape(text)}</lowvram:{name}>" for name, text in origin.values().items())
    text = f"""<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/">
 <rdf:RDF xmlns:rdf="{_RDF}">
  <rdf:Description rdf:about="" xmlns:xmp="{_XMP}" xmlns:Iptc4xmpExt="{_IPTC}" xmlns:lowvram="{OWN}">
   <Iptc4xmpExt:{_SOURCE}>{escape(origin.source)}</Iptc4xmpExt:{_SOURCE}>
   <xmp:{_TOOL}>{escape(origin.tool)}</xmp:{_TOOL}>{own}
  </rdf:Description>
 </rdf:RDF>
</x:xmpmeta>
<?xpacket end="r"?>"""
    return text.encode()


def read(packet: bytes) -> dict[str, str]:
    """What a packet says: "source" (the digital source type) and "tool", and the values of `Origin` where we wrote it.

    Properties may be elements, attributes or rdf:resource, as XMP allows.

    Raises:
        BadPacketError: see there. Nothing outside of the packet is ever read.
    """
    if len(packet) > MOST_BYTES:
        raise BadPacketError(f"its XMP has {len(packet):,} bytes, over {MOST_BYTES:,}")
    found: dict[str, str] = {}
    inside: list[tuple[str, list[str]]] = []  # open elements: what they are to us, and their text

    def keep(name: str, value: str) -> None:
        if name and value.strip():
            found.setdefault(name, value.strip()[:_MOST_TEXT])

    def start(element: str, attributes: dict[str, str]) -> None:
        inside.append((_known(element), []))
        for attribute, value in attributes.items():
            keep(inside[-1][0] if attribute == f"{_RDF}resource" else _known(attribute), value)

    def end(_: str) -> None:
        name, texts = inside.pop()
        keep(name, "".join(texts))

    def text(data: str) -> None:
        if inside and inside[-1][0]:
            inside[-1][1].append(data)

    def refuse(*_: object) -> None:
        raise BadPacketError("its XMP has a document type, which no XMP has")

    parser = expat.ParserCreate(namespace_separator="")
    parser.buffer_text = True
    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.CharacterDataHandler, parser.StartDoctypeDeclHandler = text, refuse
    try:
        parser.Parse(packet.rstrip(b"\x00"), True)
    except expat.ExpatError as error:
        raise BadPacketError(f"its XMP is no XML: {error}") from error
    return found


def _known(name: str) -> str:
    """Our name of a property, "" for those that say nothing to us. name: its namespace and itself in one."""
    if name == _IPTC + _SOURCE:
        return "source"
    if name == _XMP + _TOOL:
        return "tool"
    return name.removeprefix(OWN) if name.startswith(OWN) else ""
