"""`castalia data view|where|check|count|stats|merge|convert|exclude`: know what a model is trained on."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from castalia.cli import split_settings

_TEXT_WIDTH = 200


def arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's flags."""
    verbs = parser.add_subparsers(dest="what", required=True, metavar="view|where|check|count|stats|merge|...")

    def verb(name: str, text: str, inputs: str, many: str | int) -> argparse.ArgumentParser:
        made = verbs.add_parser(name, help=text, description=text)
        made.add_argument("inputs", nargs=many, metavar=inputs)
        made.add_argument("--json", action="store_true", help="print one JSON object")
        return made

    view = verb("view", "what a step of a run sees: documents, offsets, text", "RUN|FILE|key=value", "+")
    view.add_argument("--step", type=int, required=True, metavar="N", help="the step, counted from 0")
    view.add_argument("--row", type=int, help="only this sequence of the step")
    view.add_argument("--full", action="store_true", help=f"whole texts, not their first {_TEXT_WIDTH} characters")
    where = verb("where", "every step of a run that uses a document", "RUN|FILE|key=value", "+")
    where.add_argument("--doc", type=int, required=True, metavar="ID", help="sequence number in its data set, from 0")
    where.add_argument("--data", metavar="PREFIX", help="the document's data set, where the run reads several")
    check = verb("check", "is the data what it says it is? exit code 4 if not", "PREFIX|FILE|key=value", "+")
    check.add_argument("--tokenizer", help="that the data should be made with (default: the one beside it)")
    check.add_argument("--huge", type=int, default=1_000_000, metavar="TOKENS", help="report documents from this size")
    check.add_argument("--strict", action="store_true", help="warnings, too, make exit code 4")
    verb("count", "documents and tokens of data sets", "PREFIX", "+")
    stats = verb("stats", "lengths, most frequent ids, bytes per token", "PREFIX", 1)
    stats.add_argument("--tokenizer", help="to show ids as text (default: the one beside the data)")
    stats.add_argument("--top", type=int, default=20, metavar="N", help="so many of the most frequent ids")
    merge = verb("merge", "several data sets -> one, in the order given", "PREFIX", "+")
    convert = verb("convert", "old lazy/cached format, Megatron-LM's floats, another dtype -> a data set", "PREFIX", 1)
    convert.add_argument("--dtype", help="of the ids: uint16, int32, ...; default: as they are")
    convert.add_argument("--megatron-floats", action="store_true", help="the input has Megatron-LM's float codes")
    for made in (merge, convert):
        made.add_argument("--output", required=True, metavar="PREFIX")
        made.add_argument("--overwrite", action="store_true", help="replace an existing data set")
    exclude = verb("exclude", "write a list of documents to leave out", "PREFIX", 1)
    exclude.add_argument("--output", required=True, metavar="LIST.txt", help="an existing list is added to")
    exclude.add_argument("--docs", metavar="17,200-299", help="these documents")
    exclude.add_argument("--duplicates", action="store_true", help="documents that equal an earlier one")
    exclude.add_argument("--longer-than", type=int, metavar="TOKENS", help="documents of more tokens")
    exclude.add_argument("--reason", default="", help="a comment in the list")


def run(args: argparse.Namespace) -> int:
    """Answer."""
    for a in args.inputs:  # one place for what every prefix-taking verb would trip over
        if a.endswith((".bin", ".idx")) and args.what not in ("view", "where"):
            from castalia.errors import UserError

            raise UserError(f"{a} is a file of a data set: give its prefix, {a[:-4]}")
    answer = _VERBS[args.what](args)
    if args.json:
        print(json.dumps(answer, ensure_ascii=False))
    else:
        _SHOW[args.what](answer, args)
    return 4 if answer.get("failed") else 0


def _view(args: argparse.Namespace) -> dict[str, Any]:
    from castalia.errors import UserError
    from castalia.tools.data_view import open_data_run, view_step

    answer = view_step(open_data_run(*split_settings(args.inputs)), args.step)
    if args.row is not None:
        if not 0 <= args.row < len(answer["samples"]):
            raise UserError(f"--row {args.row}: the step has rows 0 to {len(answer['samples']) - 1}")
        answer["samples"] = [answer["samples"][args.row]]
    return answer


def _show_view(answer: dict[str, Any], args: argparse.Namespace) -> None:
    for sample in answer["samples"]:
        print(f"step {answer['step']}, row {sample['row']} (sample {sample['sample']} of the run)")
        for piece in sample["pieces"]:
            end = piece["offset"] + piece["length"]
            print(
                f"  {piece['data']}, document {piece['document']}, tokens {piece['offset']} to {end} "
                f"of {piece['document_length']}{', excluded: not learnt' if piece['excluded'] else ''}"
                f"{', rearranged to be filled in' if piece.get('rearranged') else ''}"
            )
            text = piece.get("text", str(piece["ids"]))
            cut = text if args.full or len(text) <= _TEXT_WIDTH else text[:_TEXT_WIDTH] + " ..."
            print("    " + cut.replace("\n", "\n    "))


def _where(args: argparse.Namespace) -> dict[str, Any]:
    from castalia.tools.data_view import open_data_run, where_document

    return where_document(open_data_run(*split_settings(args.inputs)), args.doc, args.data)


def _show_where(answer: dict[str, Any], args: argparse.Namespace) -> None:
    steps = {use["step"] for use in answer["uses"]}
    print(f"document {answer['document']} of {answer['data']}: {len(steps)} steps use it")
    for use in answer["uses"]:
        end = use["offset"] + use["length"]
        past = answer["done_steps"] is not None and use["step"] < answer["done_steps"]
        state = "" if answer["done_steps"] is None else ", done" if past else ", to come"
        state += ", excluded" if use["excluded"] else ""
        print(f"  step {use['step']}, row {use['row']}, tokens {use['offset']} to {end}{state}")
    if answer["left_out_samples"]:
        print(f"  {answer['left_out_samples']} further samples hold it, in steps that the run's journal leaves out")


def _check(args: argparse.Namespace) -> dict[str, Any]:
    from castalia.tools.data_check import check_all

    files, overrides = split_settings(args.inputs)
    return check_all(files, overrides, args.tokenizer, args.huge, args.strict)


def _show_check(answer: dict[str, Any], args: argparse.Namespace) -> None:
    for finding in answer["findings"]:
        examples = f" ({', '.join(map(str, finding['documents']))}{', ...' if finding['count'] > 10 else ''})"
        where = "" if finding["data"] in finding["text"] else f"{finding['data']}: "
        print(f"{finding['level']}: {where}{finding['text']}{examples if finding['documents'] else ''}")
    for row in answer["forecast"]:
        print(
            f"{row['data']}: {row['share']:.2%} of the run, {row['served']:,} tokens of {row['tokens']:,}: "
            f"read {row['epochs']:.2f} times by the end"
        )
    print(f"{len(answer['data'])} data sets checked: {'wrong' if answer['failed'] else 'good'}", file=sys.stderr)


def _count(args: argparse.Namespace) -> dict[str, Any]:
    from castalia.data.store import TokenStore

    stores = [TokenStore(prefix) for prefix in args.inputs]
    rows = [{"data": s.prefix, "documents": len(s), "tokens": s.num_tokens, "dtype": s.dtype.name} for s in stores]
    return {"data": rows, "documents": sum(map(len, stores)), "tokens": sum(s.num_tokens for s in stores)}


def _show_count(answer: dict[str, Any], args: argparse.Namespace) -> None:
    for row in [*answer["data"], *([{"data": "together", **answer}] if len(answer["data"]) > 1 else [])]:
        name = row["data"] if isinstance(row["data"], str) else "together"
        print(f"{name}: {row['documents']:,} documents, {row['tokens']:,} tokens")


def _stats(args: argparse.Namespace) -> dict[str, Any]:
    from castalia.tools.data_stats import store_stats

    return store_stats(args.inputs[0], args.tokenizer, args.top)


def _show_stats(answer: dict[str, Any], args: argparse.Namespace) -> None:
    print(f"{answer['data']}: {answer['documents']:,} documents, {answer['tokens']:,} tokens of {answer['dtype']}")
    if answer["bytes_per_token"] is not None:
        print(f"{answer['bytes_per_token']:.3f} bytes of text per token")
    lengths = answer["lengths"]
    print(f"tokens of a document: least {lengths['least']}, mean {lengths['mean']:.1f}, greatest {lengths['greatest']}")
    for row in lengths["histogram"]:
        bar = "#" * round(50 * row["documents"] / max(1, answer["documents"]))
        print(f"  {row['from']:>12,} to {row['to']:>12,}  {row['documents']:>12,}  {bar}")
    print(f"{answer['distinct_ids']:,} distinct ids; the most frequent:")
    for row in answer["frequent"]:
        text = f"  {row['text']!r}" if "text" in row else ""
        print(f"  {row['id']:>8}  {row['count']:>14,}  {row['share']:>7.3%}{text}")


def _merge(args: argparse.Namespace) -> dict[str, Any]:
    from castalia.data.merge import merge_stores

    merge_stores(args.inputs, args.output, overwrite=args.overwrite)
    args.inputs = [args.output]
    return _count(args)


def _convert(args: argparse.Namespace) -> dict[str, Any]:
    from castalia.tools.data_convert import convert

    answer = convert(args.inputs[0], args.output, args.dtype, args.megatron_floats, args.overwrite)
    return {"data": args.output, **answer}


def _show_convert(answer: dict[str, Any], args: argparse.Namespace) -> None:
    print(
        f"{answer['data']}: {answer['documents']:,} documents, {answer['tokens']:,} tokens of {answer['dtype']} "
        f"(from {answer['format']}, {answer['from_dtype']})"
    )


def _exclude(args: argparse.Namespace) -> dict[str, Any]:
    from castalia.tools.data_exclude import exclude

    return exclude(args.inputs[0], args.output, args.docs, args.duplicates, args.longer_than, args.reason)


def _show_exclude(answer: dict[str, Any], args: argparse.Namespace) -> None:
    print(
        f"{answer['list']}: {answer['documents']:,} documents of {answer['data']}, {answer['tokens']:,} tokens "
        f"({answer['share']:.3%} of it)"
    )


_VERBS = {
    "view": _view,
    "where": _where,
    "check": _check,
    "count": _count,
    "stats": _stats,
    "merge": _merge,
    "convert": _convert,
    "exclude": _exclude,
}
_SHOW = {
    "view": _show_view,
    "where": _show_where,
    "check": _show_check,
    "count": _show_count,
    "stats": _show_stats,
    "merge": _show_count,
    "convert": _show_convert,
    "exclude": _show_exclude,
}
