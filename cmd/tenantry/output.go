package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
	"unicode"
)

// outputFlags say how a command prints.
type outputFlags struct {
	Output string `short:"o" enum:"table,json" default:"table" help:"How to print: ${enum}. JSON is what the API answers; of a list, its items."`
}

func (o outputFlags) json() bool { return o.Output == "json" }

func printJSON(w io.Writer, v any) error {
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	return enc.Encode(v)
}

// printBody prints what the API answered, field by field as it came.
func printBody(w io.Writer, body []byte) error {
	var text bytes.Buffer
	if err := json.Indent(&text, bytes.TrimSpace(body), "", "  "); err != nil {
		return err
	}
	_, err := fmt.Fprintln(w, text.String())
	return err
}

// A table prints rows of cells in columns. What is empty shows as a dash.
type table struct {
	w     *tabwriter.Writer
	heads []string // not printed yet
}

func newTable(w io.Writer, heads ...string) *table {
	return &table{w: tabwriter.NewWriter(w, 0, 8, 2, ' ', 0), heads: heads}
}

// row prints a row, and before the first one the heads. Control characters, which a
// display name may have, do not reach the terminal.
func (t *table) row(cells ...any) {
	if t.heads != nil {
		_, _ = fmt.Fprintln(t.w, strings.Join(t.heads, "\t"))
		t.heads = nil
	}
	texts := make([]string, len(cells))
	for i, c := range cells {
		texts[i] = orDash(plain(fmt.Sprint(c)))
	}
	_, _ = fmt.Fprintln(t.w, strings.Join(texts, "\t"))
}

// flush prints what there is, in columns as wide as it takes.
func (t *table) flush() error { return t.w.Flush() }

// plain is text on one line with nothing in it that a terminal would obey.
func plain(text string) string {
	if strings.IndexFunc(text, unprintable) < 0 {
		return text
	}
	var b strings.Builder
	for _, r := range text {
		if unprintable(r) {
			quoted := strconv.QuoteRuneToASCII(r)
			b.WriteString(quoted[1 : len(quoted)-1])
			continue
		}
		b.WriteRune(r)
	}
	return b.String()
}

func unprintable(r rune) bool { return !unicode.IsPrint(r) }

// A listing prints the items of a list as they come: a page of a table at a time,
// or one JSON array.
type listing struct {
	w     io.Writer
	table *table // nil for JSON
	n     int
}

func newListing(w io.Writer, o outputFlags, heads ...string) *listing {
	l := &listing{w: w}
	if !o.json() {
		l.table = newTable(w, heads...)
	}
	return l
}

func (l *listing) item(raw json.RawMessage) error {
	before := ",\n"
	if l.n == 0 {
		before = "[\n"
	}
	l.n++
	_, err := fmt.Fprintf(l.w, "%s  %s", before, raw)
	return err
}

func (l *listing) end() error {
	switch {
	case l.table != nil:
		return l.table.flush()
	case l.n == 0:
		_, err := fmt.Fprintln(l.w, "[]")
		return err
	}
	_, err := fmt.Fprintln(l.w, "\n]")
	return err
}

// pageSize is how many items are asked for at once.
const pageSize = 1000

// printList prints up to limit items of a list of the API, 0 being all. name is that
// of the list in the answer; ask asks for a page; row prints an item into a table.
func printList[T any](e env, o outputFlags, limit int, name string, heads []string,
	ask func(size int, cursor *string) (*http.Response, error), row func(*table, T)) error {
	if limit < 0 {
		return usagef("--limit must not be negative")
	}
	out := newListing(e.stdout, o, heads...)
	var cursor *string
	for printed, more := 0, true; more; {
		size := pageSize
		if limit > 0 {
			size = min(size, limit-printed)
		}
		page, err := answer[map[string]json.RawMessage](ask(size, cursor))
		if err != nil {
			return err
		}
		var items []json.RawMessage
		if err := json.Unmarshal(page.value[name], &items); err != nil {
			return fmt.Errorf("the API's answer cannot be read: %w", err)
		}
		for _, raw := range items {
			if err := printItem(out, raw, row); err != nil {
				return err
			}
		}
		if out.table != nil {
			if err := out.table.flush(); err != nil {
				return err
			}
		}
		printed += len(items)
		cursor = nil
		if raw, ok := page.value["next_cursor"]; ok {
			if err := json.Unmarshal(raw, &cursor); err != nil {
				return fmt.Errorf("the API's answer cannot be read: %w", err)
			}
		}
		more = cursor != nil && (limit == 0 || printed < limit)
	}
	if err := out.end(); err != nil {
		return err
	}
	if cursor != nil {
		_, _ = fmt.Fprintf(e.stderr, "there are more: --limit 0 prints all\n")
	}
	return nil
}

func printItem[T any](out *listing, raw json.RawMessage, row func(*table, T)) error {
	if out.table == nil {
		return out.item(raw)
	}
	var item T
	if err := json.Unmarshal(raw, &item); err != nil {
		return fmt.Errorf("the API's answer cannot be read: %w", err)
	}
	row(out.table, item)
	return nil
}

// shownTime is a time to the second, for where it must be exact.
func shownTime(t time.Time, zero string) string {
	if t.IsZero() {
		return zero
	}
	return t.UTC().Format(time.RFC3339)
}

// ago is how long before or after now a time is, for people.
func ago(t *time.Time, now time.Time) string {
	if t == nil || t.IsZero() {
		return ""
	}
	// What happened a moment ago may lie ahead of this machine's clock.
	if d := now.Sub(*t); d > -time.Second {
		return span(max(d, 0)) + " ago"
	}
	return "in " + span(t.Sub(now))
}

// exactly is a time and how far from now it is.
func exactly(t *time.Time, now time.Time) string {
	if t == nil || t.IsZero() {
		return ""
	}
	return shownTime(*t, "") + " (" + ago(t, now) + ")"
}

// span is a duration in its largest unit, rounded down.
func span(d time.Duration) string {
	const day = 24 * time.Hour
	switch {
	case d < time.Minute:
		return fmt.Sprintf("%ds", d/time.Second)
	case d < time.Hour:
		return fmt.Sprintf("%dm", d/time.Minute)
	case d < 2*day:
		return fmt.Sprintf("%dh", d/time.Hour)
	}
	return fmt.Sprintf("%dd", d/day)
}

func textOr(text *string, otherwise string) string {
	if text == nil || *text == "" {
		return otherwise
	}
	return *text
}

func orDash(text string) string { return textOr(&text, "-") }

// given returns nil for a flag that was not.
func given[T comparable](v T) *T {
	var zero T
	if v == zero {
		return nil
	}
	return &v
}
