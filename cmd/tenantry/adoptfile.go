package main

import (
	"bytes"
	"encoding/csv"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/tenantry/tenantry/internal/tenant"
)

// An adoptRow is a line of a file of apps to be adopted.
type adoptRow struct {
	Line    int
	ID      tenant.ID
	What    tenant.AdoptRequest
	Profile string
	Name    string // display name; may be empty
	// Fault says what is wrong with the line; the rest is then not to be relied on. It
	// never repeats what stands in the line but for the tenant's id.
	Fault string
}

// The columns of such a file, and the fields of its objects.
var adoptColumns = []string{"tenant_id", "app_id", "user_id", "key", "profile", "display_name"}

const adoptHeader = "tenant_id,app_id[,user_id][,key][,profile][,display_name]"

// parseAdoptFile reads a file in one of the formats csv and ndjson. An error is about the
// whole file; what is wrong with single lines stands in their rows. Lines that are empty
// are passed over.
func parseAdoptFile(format string, data []byte) ([]adoptRow, error) {
	if bytes.HasPrefix(data, []byte{0xff, 0xfe}) || bytes.HasPrefix(data, []byte{0xfe, 0xff}) {
		return nil, errors.New("is UTF-16: save it as UTF-8")
	}
	data = bytes.TrimPrefix(data, []byte("\ufeff"))
	var rows []adoptRow
	var err error
	if format == "csv" {
		rows, err = parseAdoptCSV(data)
	} else {
		rows = parseAdoptNDJSON(data)
	}
	if err == nil && len(rows) == 0 {
		err = errors.New("names no apps")
	}
	return rows, err
}

func parseAdoptCSV(data []byte) ([]adoptRow, error) {
	r := csv.NewReader(bytes.NewReader(data))
	r.FieldsPerRecord = -1
	header, err := r.Read()
	if errors.Is(err, io.EOF) {
		return nil, nil
	}
	line := 1
	if err == nil {
		line, _ = r.FieldPos(0)
	}
	columns, fault := adoptColumnsOf(header)
	if err != nil || fault != "" {
		return nil, fmt.Errorf("line %d: the header must read %s, separated by commas%s", line, adoptHeader, fault)
	}
	var rows []adoptRow
	for {
		record, err := r.Read()
		if errors.Is(err, io.EOF) {
			return rows, nil
		}
		if e, ok := errors.AsType[*csv.ParseError](err); ok {
			fault := "a quote stands where none may: put a field with quotes or commas into quotes, and double the quotes in it"
			if errors.Is(err, csv.ErrQuote) && e.Line > e.StartLine {
				fault += fmt.Sprintf("; the lines up to %d were taken for a part of it", e.Line)
			}
			rows = append(rows, adoptRow{Line: e.StartLine, Fault: fault})
			continue
		}
		if err != nil {
			return nil, err
		}
		line, _ := r.FieldPos(0)
		if len(record) == 1 && strings.TrimSpace(record[0]) == "" {
			continue
		}
		if len(record) != len(columns) {
			rows = append(rows, adoptRow{Line: line, Fault: fmt.Sprintf("has %d fields, and the header %d", len(record), len(columns))})
			continue
		}
		fields := map[string]string{}
		for i, name := range columns {
			fields[name] = record[i]
		}
		rows = append(rows, newAdoptRow(line, fields))
	}
}

// adoptColumnsOf returns the columns that a header names, or what is wrong with it.
func adoptColumnsOf(header []string) (columns []string, fault string) {
	for _, name := range header {
		name = strings.ToLower(strings.TrimSpace(name))
		switch {
		case !slices.Contains(adoptColumns, name):
			return nil, "; it names another column" // which may be a key, where the header is missing
		case slices.Contains(columns, name):
			return nil, fmt.Sprintf("; it names %s twice", name)
		}
		columns = append(columns, name)
	}
	for _, name := range adoptColumns[:2] {
		if !slices.Contains(columns, name) {
			return nil, fmt.Sprintf("; it lacks %s", name)
		}
	}
	return columns, ""
}

func parseAdoptNDJSON(data []byte) []adoptRow {
	var rows []adoptRow
	for i, text := range bytes.Split(data, []byte("\n")) {
		if text = bytes.TrimSpace(text); len(text) == 0 {
			continue
		}
		line := i + 1
		var raw map[string]json.RawMessage
		if !utf8.Valid(text) || json.Unmarshal(text, &raw) != nil || raw == nil {
			rows = append(rows, adoptRow{Line: line, Fault: "is not one JSON object in UTF-8"})
			continue
		}
		row, fields := adoptRow{Line: line}, map[string]string{}
		for name, value := range raw {
			var s *string
			switch {
			case !slices.Contains(adoptColumns, name):
				row.Fault = "has a field that is none of " + strings.Join(adoptColumns, ", ")
			case json.Unmarshal(value, &s) != nil:
				row.Fault = name + " must be a string"
			case s != nil:
				fields[name] = *s
			}
		}
		if row.Fault == "" {
			row = newAdoptRow(line, fields)
		}
		rows = append(rows, row)
	}
	return rows
}

// newAdoptRow checks what can be checked without asking the service.
func newAdoptRow(line int, fields map[string]string) adoptRow {
	row := adoptRow{Line: line, Name: fields["display_name"], Profile: strings.TrimSpace(fields["profile"])}
	for _, name := range adoptColumns {
		if !utf8.ValidString(fields[name]) {
			row.Fault = name + " is not valid UTF-8"
			return row
		}
	}
	id, err := tenant.ParseID(strings.TrimSpace(fields["tenant_id"]))
	if err != nil {
		row.Fault = faultOf(err)
		return row
	}
	row.ID = id
	row.What = tenant.AdoptRequest{AppID: tenant.AppID(strings.TrimSpace(fields["app_id"])), UserID: tenant.UserID(strings.TrimSpace(fields["user_id"]))}
	if key := strings.TrimSpace(fields["key"]); key != "" {
		row.What.Key = tenant.NewSecret(key)
	}
	err = row.What.Validate()
	if err == nil {
		err = tenant.SignUp{DisplayName: &row.Name}.Validate()
	}
	if err != nil {
		row.Fault = faultOf(err)
	}
	if row.Profile != "" && !tenant.ValidProfileName(row.Profile) {
		row.Fault = "profile has a name that no profile can have"
	}
	return row
}

// faultOf is what a person is told of a field that is wrong.
func faultOf(err error) string {
	if e, ok := errors.AsType[*tenant.Error](err); ok {
		return strings.TrimPrefix(e.Field, "adopt.") + " " + e.Detail
	}
	return err.Error()
}

// duplicatesIn says which lines name a tenant or an app that an earlier one names.
func duplicatesIn(rows []adoptRow) []string {
	var found []string
	tenants, apps := map[tenant.ID]int{}, map[tenant.AppID]int{}
	for _, r := range rows {
		if r.Fault != "" {
			continue
		}
		if first, ok := tenants[r.ID]; ok {
			found = append(found, fmt.Sprintf("lines %d and %d name the tenant %s", first, r.Line, r.ID))
		} else {
			tenants[r.ID] = r.Line
		}
		// Of two owners, too: Tenantry knows an app by its id alone.
		if first, ok := apps[r.What.AppID]; ok {
			found = append(found, fmt.Sprintf("lines %d and %d name the app %s", first, r.Line, r.What.AppID))
		} else {
			apps[r.What.AppID] = r.Line
		}
	}
	return found
}
