"""The corpora that have names, with the addresses of their files.

The names and addresses are GPT-NeoX's (`corpora.py` there), so that what its documentation
calls for can be asked for here; mirrors follow where one is known. Its own tests expect all
addresses but that of enwik8 to fail by now, and `state` says so.
"""

from __future__ import annotations

from dataclasses import dataclass, field

_EYE = "https://the-eye.eu/public/AI/"
_COMPONENTS = _EYE + "pile_preliminary_components/"
_STAGING = "https://the-eye.eu/eleuther_staging/c4/"
_ALLENAI = "https://huggingface.co/datasets/allenai/c4/resolve/main/"  # the publisher's own copy
_GONE = "GPT-NeoX's own tests expect this address to be gone"
_MIXED = "each document has its author's terms"


@dataclass(frozen=True, slots=True)
class File:
    """One file of a corpus.

    Attributes:
        name: under which it is kept.
        urls: where it lies; the first that answers is taken.
        size: bytes, where known.
        sha256: hexadecimal, where known.
    """

    name: str
    urls: tuple[str, ...]
    size: int | None = None
    sha256: str | None = None


@dataclass(frozen=True, slots=True)
class Corpus:
    """A corpus.

    Attributes:
        text: what it is, in a few words.
        files: what is fetched; empty where `made` says how it is made.
        licence: of its texts.
        documents: how many, where known.
        state: what is known of its addresses.
        made: "stdlib" or "debian": it is made on this machine, or from packages.
    """

    text: str
    files: tuple[File, ...] = field(default=(), repr=False)
    licence: str = _MIXED
    documents: int | None = None
    state: str = ""
    made: str = ""


def _at(*urls: str) -> tuple[File, ...]:
    """One file, named as in its first address."""
    return (File(urls[0].rsplit("/", 1)[-1], urls),)


def _component(file: str, text: str, licence: str = _MIXED, documents: int | None = None, state: str = _GONE) -> Corpus:
    return Corpus(f"a component of the Pile: {text}", _at(_COMPONENTS + file), licence, documents, state)


def _c4(part: str, old: str, shards: int) -> tuple[File, ...]:
    names = [f"c4-train.{n:05d}-of-{shards:05d}.json.gz" for n in range(shards)]
    return tuple(File(n, (f"{_STAGING}{old}/{n}", f"{_ALLENAI}{part}/{n}")) for n in names)


_PILE_SHARDS = tuple(File(f"{n:02d}.jsonl.zst", (f"{_EYE}pile/train/{n:02d}.jsonl.zst",)) for n in range(30))
_ODC = "ODC-BY; each document has its author's terms"
_C4_STATE = f"{_GONE}; the publisher's copy at huggingface.co follows"
_PUBLIC = "public domain"

CORPORA: dict[str, Corpus] = {
    "stdlib": Corpus(
        "the Python standard library's own source and documentation, about 13 MB; needs no network",
        licence="PSF", made="stdlib",
    ),
    "debian-docs": Corpus(
        "manuals from Debian packages (Linux, Python, Perl, Vim, policy; an FAQ), about 67 MB; 78 MB to fetch",
        licence="free by Debian's guidelines: each package's own (GPL, PSF, Artistic, Vim, ...)", documents=4215,
        state="Debian's mirrors, or its archive", made="debian",
    ),
    "enwik8": Corpus(
        "the first 10^8 bytes of a dump of the English Wikipedia, one document",
        _at("http://mattmahoney.net/dc/enwik8.zip", "https://data.deepai.org/enwik8.zip"), "CC BY-SA and GFDL", 1,
    ),
    "enron": Corpus(
        "emails of Enron's staff", _at("http://eaidata.bmk.sh/data/enron_emails.jsonl.zst"), _PUBLIC, 517_401, _GONE,
    ),
    "pile": Corpus("the Pile: its 30 shards of training data, about 430 GB", _PILE_SHARDS, state=_GONE),
    "pile_subset": Corpus("the first of the Pile's 30 shards", _PILE_SHARDS[:1], state=_GONE),
    "pile_val": Corpus("the Pile's validation data", _at(_EYE + "pile/val.jsonl.zst"), state=_GONE),
    "pile_test": Corpus("the Pile's test data", _at(_EYE + "pile/test.jsonl.zst"), state=_GONE),
    "github": Corpus(
        "source code from GitHub, a sample", _at("http://eaidata.bmk.sh/data/github_small.jsonl.zst"), state=_GONE
    ),
    "arxiv": _component("2020-09-08-arxiv-extracts-nofallback-until-2007-068.tar.gz", "papers from arXiv"),
    "europarl": _component("EuroParliamentProceedings_1996_2011.jsonl.zst", "the European Parliament's proceedings"),
    "freelaw": _component("FreeLaw_Opinions.jsonl.zst", "opinions of United States courts", _PUBLIC),
    "nih": _component("NIH_ExPORTER_awarded_grant_text.jsonl.zst", "abstracts of grants by the NIH", _PUBLIC),
    "pubmed": _component("PMC_extracts.tar.gz", "papers from PubMed Central"),
    "books1": _component("books1.tar.gz", "books"),
    "books3": _component(
        "books3.tar.gz", "books", "none: many of its books are under copyright",
        state=f"{_GONE}; taken down by its host after complaints about copyright",
    ),
    "hackernews": _component("hn.tar.gz", "discussions on Hacker News", documents=373_000),
    "openwebtext2": Corpus(
        "a component of the Pile: pages that Reddit linked to",
        _at(
            _COMPONENTS + "openwebtext2.jsonl.zst.tar",
            "https://huggingface.co/datasets/segyges/OpenWebText2/resolve/main/openwebtext2.jsonl.zst.tar",
        ),
        documents=17_103_000, state=f"{_GONE}; a copy at huggingface.co follows",
    ),
    "stackexchange": _component("stackexchange_dataset.tar", "questions and answers", "CC BY-SA"),
    "ubuntu_irc": _component("ubuntu_irc_until_2020_9_1.jsonl.zst", "logs of Ubuntu's chat rooms"),
    "youtube_subtitles": _component("yt_subs.jsonl.zst", "subtitles from YouTube"),
    "c4": Corpus(
        "C4: cleaned pages of Common Crawl, English, 1,024 shards", _c4("en", "en", 1024), _ODC, state=_C4_STATE
    ),
    "c4_openwebtext": Corpus(
        "C4's part that is like news, 512 shards", _c4("realnewslike", "realnewslike", 512), _ODC, state=_C4_STATE
    ),
}  # fmt: skip
