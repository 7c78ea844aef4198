"""Kinds of files by the ending of their name; they choose the files of a folder and the reader of each."""

# Endings of plain text, in files that are one document each. Source code is text too.
TEXT = {
    ".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".org", ".adoc", ".log", ".py", ".js", ".ts", ".jsx",
    ".tsx", ".java", ".c", ".h", ".cc", ".cpp", ".cxx", ".hpp", ".rs", ".go", ".rb", ".php", ".sh", ".bash", ".sql",
    ".r", ".jl", ".scala", ".kt", ".swift", ".lua", ".pl", ".hs", ".ml", ".lean", ".v", ".cs", ".f90", ".m", ".mm",
    ".cu", ".proto",
}  # fmt: skip
# Endings of files that hold many documents, the most specific first: a folder is read as the first kind that it has.
RECORDS = ((".parquet",), (".arrow",), (".array_record",), (".jsonl", ".ndjson"), (".json",))
COMPRESSED = (".gz", ".zst")  # after one of the above

_TABLE = (
    "is a table, and its syntax would become text; convert it to Parquet first, as in `pyarrow.parquet.write_table("
    "pyarrow.csv.read_csv(IN), OUT)`, or `datasets.Dataset.from_csv(IN).to_parquet(OUT)`"
)
_MARKUP = "is markup, and its syntax would become text; extract the text first, or append ?as=text to read it as it is"
_DOCUMENT = "is not plain text; extract the text to .txt or .jsonl first"
_PACKED = "is compressed in a way that is not read; decompress it, or compress it with gzip or zstd"
# Endings of what is no text -> what it is, and what to do.
REFUSED: dict[str, str] = (
    dict.fromkeys((".csv", ".tsv", ".psv", ".xls", ".xlsx", ".ods", ".dbf"), _TABLE)
    | dict.fromkeys((".yaml", ".yml", ".toml", ".ini", ".xml", ".html", ".htm", ".xhtml", ".svg", ".rss"), _MARKUP)
    | dict.fromkeys((".ipynb", ".srt", ".vtt", ".rtf", ".bib", ".eml", ".mbox"), _MARKUP)
    | dict.fromkeys((".pdf", ".doc", ".docx", ".odt", ".epub", ".mobi", ".ppt", ".pptx", ".djvu"), _DOCUMENT)
    | dict.fromkeys((".bz2", ".xz", ".lz4", ".br", ".zip", ".7z", ".rar", ".tar", ".tgz", ".lzma"), _PACKED)
)

# Names, without ending and in lower case, of files that describe a data set and are no part of it.
ABOUT = {
    "readme", "license", "licence", "copying", "notice", "changelog", "contributing", "citation", "authors",
    "datasheet",
}  # fmt: skip
