package main

import (
	"bufio"
	"bytes"
	"encoding/csv"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/tenantry/tenantry/internal/tenant"
)

// An importItem is a sign-up of a file, as the API takes it.
type importItem struct {
	ID          string            `json:"id"`
	Profile     *string           `json:"profile,omitempty"`
	DisplayName *string           `json:"display_name,omitempty"`
	Labels      map[string]string `json:"labels,omitempty"`
}

// An importRow is a line of a file of users.
type importRow struct {
	Line int
	Item importItem
	// Fault says what is wrong with the line; the rest is then not to be relied on.
	Fault  string
	record []string // of a CSV file, as it stands there
}

// How an import file names its columns, and the fields of its objects. The last is what
// --failed adds; it is passed over.
const (
	columnID      = "id"
	columnProfile = "profile"
	columnName    = "display_name"
	columnLabels  = "labels"
	labelPrefix   = columnLabels + "."
	columnError   = "error"
)

const importHeader = "id[,profile][,display_name][,labels.KEY]…"

// maxImportLine is longer than any line of a user can be, however it is escaped.
const maxImportLine = 256 << 10

// An importReader reads a file of users line by line, and holds one at a time.
type importReader struct {
	format  string // csv or ndjson
	in      *bufio.Reader
	line    int      // that was read last
	columns []string // of a CSV file
	text    []byte   // of the record that is read, when it has several lines
	record  *bufio.Reader
	broken  bool // where the next line begins is not known any more
}

// newImportReader begins to read a file. Of the format auto it finds out itself by the
// first character. An error is about the whole file.
func newImportReader(r io.Reader, format string) (*importReader, error) {
	in := bufio.NewReaderSize(r, maxImportLine)
	begin, err := in.Peek(len("\ufeff"))
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	if bytes.HasPrefix(begin, []byte{0xff, 0xfe}) || bytes.HasPrefix(begin, []byte{0xfe, 0xff}) {
		return nil, errors.New("is UTF-16: save it as UTF-8")
	}
	if string(begin) == "\ufeff" {
		_, _ = in.Discard(len(begin))
	}
	if format == "auto" {
		format = "csv"
		if begin, _ = in.Peek(1); len(begin) == 1 && begin[0] == '{' {
			format = "ndjson"
		}
	}
	f := &importReader{format: format, in: in, record: bufio.NewReader(nil)}
	if format == "csv" {
		return f, f.readHeader()
	}
	return f, nil
}

// readLine reads a line, without what ends it, and reports whether it was too long and is
// not what it returns. The line is valid until the next read.
func (f *importReader) readLine() (line []byte, tooLong bool, err error) {
	line, err = f.in.ReadSlice('\n')
	for errors.Is(err, bufio.ErrBufferFull) {
		tooLong = true
		line, err = f.in.ReadSlice('\n')
	}
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, tooLong, err
	}
	if err != nil && len(line) == 0 && !tooLong {
		return nil, false, io.EOF
	}
	f.line++
	return bytes.TrimSuffix(bytes.TrimSuffix(line, []byte("\n")), []byte("\r")), tooLong, nil
}

var tooLongFault = fmt.Sprintf("has more than %d bytes", maxImportLine)

// next returns the next row that holds something, and io.EOF behind the last.
func (f *importReader) next() (importRow, error) {
	for {
		if f.broken {
			return importRow{}, io.EOF
		}
		line, tooLong, err := f.readLine()
		if err != nil {
			return importRow{}, err
		}
		at := f.line
		if tooLong {
			return importRow{Line: at, Fault: tooLongFault}, nil
		}
		if len(bytes.TrimSpace(line)) == 0 {
			continue
		}
		row := importRow{}
		if f.format == "csv" {
			row, err = f.csvRow(line)
		} else {
			row = objectRow(line)
		}
		if err != nil {
			return row, err
		}
		if row.Fault == "" {
			row.Fault = row.Item.fault()
		}
		row.Line = at
		return row, nil
	}
}

// quotesOpen reports whether a text of CSV ends within quotes.
func quotesOpen(text []byte) bool { return bytes.Count(text, []byte(`"`))%2 == 1 }

// csvRecord reads the record that begins with a line.
func (f *importReader) csvRecord(line []byte) (record []string, fault string, err error) {
	if quotesOpen(line) {
		f.text = append(append(f.text[:0], line...), '\n')
		for open := true; open; {
			more, tooLong, err := f.readLine()
			if err != nil && !errors.Is(err, io.EOF) {
				return nil, "", err
			}
			if err != nil || tooLong || len(f.text)+len(more) > maxImportLine {
				f.broken = true
				return nil, "opens a quote that no later line closes; what follows was not looked at", nil
			}
			f.text = append(append(f.text, more...), '\n')
			open = !quotesOpen(more)
		}
		line = f.text
	}
	if !utf8.Valid(line) {
		return nil, "is not UTF-8", nil
	}
	f.record.Reset(bytes.NewReader(line))
	r := csv.NewReader(f.record)
	r.FieldsPerRecord = -1
	record, err = r.Read()
	if err == nil {
		if _, more := r.Read(); !errors.Is(more, io.EOF) {
			err = csv.ErrQuote
		}
	}
	if err != nil {
		return nil, "has a quote where none may stand: put a field with quotes or commas into quotes, and double the quotes in it", nil
	}
	return record, "", nil
}

func (f *importReader) readHeader() error {
	header, tooLong, err := f.readLine()
	for err == nil && !tooLong && len(bytes.TrimSpace(header)) == 0 {
		header, tooLong, err = f.readLine()
	}
	if errors.Is(err, io.EOF) {
		return errors.New("is empty")
	}
	if err != nil {
		return err
	}
	wrong := func(why string) error {
		return fmt.Errorf("line %d: the header must read %s, separated by commas; %s", f.line, importHeader, why)
	}
	if tooLong {
		return wrong("it " + tooLongFault)
	}
	record, fault, err := f.csvRecord(header)
	if err != nil {
		return err
	}
	if fault != "" {
		return wrong("it " + fault)
	}
	for i, name := range record {
		name = strings.TrimSpace(name)
		label, isLabel := strings.CutPrefix(name, labelPrefix)
		if !isLabel {
			name = strings.ToLower(name)
		}
		switch {
		case isLabel && tenant.ValidateLabels(map[string]string{label: ""}) != nil:
			return wrong(fmt.Sprintf("its column %d names a label that cannot be", i+1))
		case name == "tenant_id": // as files of apps that are adopted have it
			name = columnID
		case isLabel, slices.Contains([]string{columnID, columnProfile, columnName, columnError}, name):
		default:
			return wrong(fmt.Sprintf("its column %d is none of these", i+1))
		}
		if slices.Contains(f.columns, name) {
			return wrong(fmt.Sprintf("its column %d was there before", i+1))
		}
		f.columns = append(f.columns, name)
	}
	if !slices.Contains(f.columns, columnID) {
		return wrong("it lacks id")
	}
	return nil
}

func (f *importReader) csvRow(line []byte) (importRow, error) {
	record, fault, err := f.csvRecord(line)
	row := importRow{Fault: fault, record: record}
	if err != nil || fault != "" {
		return row, err
	}
	if len(record) != len(f.columns) {
		row.Fault = fmt.Sprintf("has %d fields, and the header %d", len(record), len(f.columns))
		return row, nil
	}
	for i, name := range f.columns {
		text := record[i]
		if text == "" {
			continue
		}
		switch label, isLabel := strings.CutPrefix(name, labelPrefix); {
		case isLabel:
			if row.Item.Labels == nil {
				row.Item.Labels = map[string]string{}
			}
			row.Item.Labels[label] = text
		case name == columnID:
			row.Item.ID = text
		case name == columnProfile:
			row.Item.Profile = &text
		case name == columnName:
			row.Item.DisplayName = &text
		}
	}
	return row, nil
}

func objectRow(line []byte) importRow {
	var row importRow
	var fields map[string]json.RawMessage
	if !utf8.Valid(line) || json.Unmarshal(line, &fields) != nil || fields == nil {
		row.Fault = "is not one JSON object in UTF-8"
		return row
	}
	for _, name := range slices.Sorted(maps.Keys(fields)) {
		value := fields[name]
		var to any
		kind := "a string"
		switch name {
		case columnID, "tenant_id":
			to = &row.Item.ID
		case columnProfile:
			to = &row.Item.Profile
		case columnName:
			to = &row.Item.DisplayName
		case columnLabels:
			to, kind = &row.Item.Labels, "an object of strings"
		case columnError:
			continue
		default:
			row.Fault = "has a field that is none of id, profile, display_name, labels"
			return row
		}
		if json.Unmarshal(value, to) != nil {
			row.Fault = name + " must be " + kind
			return row
		}
	}
	return row
}

// fault says what is wrong with an item as the service would, or "".
func (i importItem) fault() string {
	_, err := tenant.ParseID(i.ID)
	if err == nil {
		err = tenant.SignUp{Profile: i.Profile, DisplayName: i.DisplayName, Labels: i.Labels}.Validate()
	}
	if e, ok := errors.AsType[*tenant.Error](err); ok {
		return strings.TrimPrefix(e.Field, "tenant_") + " " + e.Detail
	}
	return ""
}

// A csvWriter writes rows as they were read, with why they failed in a column behind.
type csvWriter struct{ w *csv.Writer }

func newCSVWriter(to io.Writer, columns []string) *csvWriter {
	w := &csvWriter{csv.NewWriter(to)}
	_ = w.write(columns, columns, columnError) // which flush reports
	return w
}

func (w *csvWriter) row(columns, record []string, why string) error {
	return w.write(columns, record, why)
}

func (w *csvWriter) write(columns, record []string, why string) error {
	var fields []string
	for i, name := range columns {
		if name != columnError {
			fields = append(fields, record[i])
		}
	}
	return w.w.Write(append(fields, why))
}

func (w *csvWriter) flush() error {
	w.w.Flush()
	return w.w.Error()
}
