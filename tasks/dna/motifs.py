"""Writes motifs.json: count matrices of some human factors, from JASPAR 2024 by `pyjaspar`.

    pip install pyjaspar==4.0.0 && python tasks/dna/motifs.py

Liver: factors whose motifs mark open chromatin of liver cells.  Other: blood, stem cells and factors found
anywhere.  Only matrices of human factors are taken; where JASPAR has the mouse factor alone (SPI1, RUNX1), a
human relative with the same motif stands in (SPIB, RUNX3).
"""

from __future__ import annotations

import json
from pathlib import Path

RELEASE = "JASPAR2024"
GROUPS = {
    "liver": {
        "HNF4A": "MA0114",
        "HNF1A": "MA0046",
        "FOXA1": "MA0148",
        "FOXA2": "MA0047",
        "CEBPA": "MA0102",
        "CEBPB": "MA0466",
        "ONECUT1": "MA0679",
        "PROX1": "MA0794",
        "NR2F2": "MA1111",
        "PPARA::RXRA": "MA1148",
        "NR1H4::RXRA": "MA1146",
        "HLF": "MA0043",
    },
    "other": {
        "GATA1": "MA0035",
        "GATA1::TAL1": "MA0140",
        "SPIB": "MA0081",
        "RUNX3": "MA0684",
        "EBF1": "MA0154",
        "IRF4": "MA1419",
        "POU5F1": "MA1115",
        "SOX2": "MA0143",
        "KLF4": "MA0039",
        "CTCF": "MA0139",
        "SP1": "MA0079",
        "FOS::JUN": "MA0099",
        "RELA": "MA0107",
    },
}
HEADER = {
    "source": "JASPAR 2024 CORE, latest version of each human matrix, as packaged in pyjaspar 4.0.0 (PyPI)",
    "licence": (
        "pyjaspar: MIT, (c) 2025 Aziz Khan. JASPAR states that its data can be used with no restrictions; "
        "the terms of the 2024 release were not checked online"
    ),
    "cite": "Rauluseviciute et al. 2024, Nucleic Acids Research 52 D174, doi:10.1093/nar/gkad1059",
    "rows": "A C G T",
}


def main() -> None:
    from pyjaspar import jaspardb

    base = jaspardb(release=RELEASE)
    motifs = []
    for group, wanted in GROUPS.items():
        for name, identifier in wanted.items():
            found = base.fetch_motif_by_id(identifier)  # without a version: the latest
            if found.name != name or found.species != ["9606"] or found.collection != "CORE":
                raise SystemExit(f"{identifier} is {found.name} of species {found.species}, not human {name}")
            matrix, version = found.matrix_id.split(".")
            counts = [[round(float(c)) for c in found.counts[letter]] for letter in "ACGT"]
            motifs.append(
                {"id": matrix, "version": int(version), "name": name, "group": group, "counts": counts}
            )
    lines = ",\n".join("  " + json.dumps(m, separators=(",", ":")) for m in motifs)
    head = json.dumps(HEADER, indent=1)[:-2]
    text = f'{head},\n "motifs": [\n{lines}\n ]\n}}\n'
    json.loads(text)
    Path(__file__).with_name("motifs.json").write_text(text, encoding="utf-8")
    print(f"{len(motifs)} motifs")


if __name__ == "__main__":
    main()
