package tenant

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"go.yaml.in/yaml/v3"
)

// A ProfilesFile is what a profiles file holds. Its form, in YAML:
//
//	profiles:
//	  default:                      # of a sign-up that names none
//	    base_workflow: Empty        # the default
//	    language: en
//	    app_description: Made for Acme
//	    key_scopes: [All]           # of the key named default
//	    extra_keys:
//	      search: {scopes: [Search, Inputs_Get]}
//	    allowed_scopes: [All]       # of keys that callers add
//	    show_tenant: none           # or id, or hash
//	    retention: 7d
//	    max_key_age: 90d
//	    pool: {min: 2, max: 20}     # the default; max: 0 keeps none
//
// Anchors, aliases and merge keys (<<) work; top-level fields that begin with x- are
// left to the file's author, as a place for anchors.
type ProfilesFile struct {
	Profiles []Profile     // in the order of the file; not to be used if Faults has more than warnings
	Faults   []ProfileLine // in the order of the file
	// Line is where the profiles begin, for what is missing there.
	Line int
}

// A ProfileLine is something wrong with a line of a profiles file.
type ProfileLine struct {
	Line    int // counted from 1
	Detail  string
	Warning bool // the file can be used as it is
}

// In returns l as a line of output that editors know how to follow.
func (l ProfileLine) In(file string) string {
	if l.Warning {
		return fmt.Sprintf("%s:%d: warning: %s", file, l.Line, l.Detail)
	}
	return fmt.Sprintf("%s:%d: %s", file, l.Line, l.Detail)
}

// Faulty reports whether the file cannot be used.
func (f ProfilesFile) Faulty() bool {
	return slices.ContainsFunc(f.Faults, func(l ProfileLine) bool { return !l.Warning })
}

const (
	maxProfilesFile = 1 << 20
	maxProfiles     = 256
	maxListedScopes = 256
	minKeyAge       = time.Hour // less would spend the upstream rate on rotations
)

// ParseProfiles reads a profiles file and reports every fault of it at once.
func ParseProfiles(text []byte) ProfilesFile {
	r := &profilesReader{last: lineAt(text, len(text))}
	if len(text) > maxProfilesFile {
		r.fault(1, "the file has %d bytes: at most %d are allowed", len(text), maxProfilesFile)
		return r.file
	}
	if at := invalidUTF8(text); at >= 0 {
		r.fault(lineAt(text, at), "not YAML: it is not UTF-8")
		return r.file
	}
	decoder := yaml.NewDecoder(bytes.NewReader(text))
	var doc, second yaml.Node
	switch err := decoder.Decode(&doc); {
	case errors.Is(err, io.EOF) || err == nil && len(doc.Content) == 0:
		r.fault(1, "the file is empty: it must have a field profiles")
		return r.file
	case err != nil:
		r.syntax(text, err)
		return r.file
	}
	if err := decoder.Decode(&second); err == nil {
		r.fault(second.Line, "a second document begins: a profiles file has one")
	} else if !errors.Is(err, io.EOF) {
		r.syntax(text, err)
	}
	r.root(doc.Content[0])
	slices.SortFunc(r.file.Faults, func(a, b ProfileLine) int {
		return cmp.Or(a.Line-b.Line, strings.Compare(a.Detail, b.Detail))
	})
	// An anchor's content is read wherever it is used.
	r.file.Faults = slices.Compact(r.file.Faults)
	return r.file
}

// invalidUTF8 is where text stops being UTF-8, or -1.
func invalidUTF8(text []byte) int {
	for at := 0; at < len(text); {
		r, size := utf8.DecodeRune(text[at:])
		if r == utf8.RuneError && size == 1 {
			return at
		}
		at += size
	}
	return -1
}

type profilesReader struct {
	file ProfilesFile
	last int // line

	// Of the profile at hand: its name for messages, the lines of its fields and
	// which of them were reported already, by their paths.
	of     string
	lines  map[string]int
	unread map[string]bool
}

// within bounds what the parser takes for a line: it sees one more after the last, and
// knows line breaks that editors do not.
func (r *profilesReader) within(line int) int { return max(1, min(line, r.last)) }

func (r *profilesReader) fault(line int, format string, args ...any) {
	r.file.Faults = append(r.file.Faults, ProfileLine{Line: r.within(line), Detail: fmt.Sprintf(format, args...)})
}

var (
	syntaxLine = regexp.MustCompile(`^line (\d+): `)
	// Of these the parser gives the line before, and of the place where the list or
	// mapping began that it could not read to its end.
	oneLater      = regexp.MustCompile(`^did not find expected (key|node content|'-' indicator|',' or |<)|^found (undefined tag|duplicate %|incompatible)`)
	unknownAnchor = regexp.MustCompile(`^unknown anchor '(.+)' referenced$`)
)

// syntax reports what the parser cannot read. It names the line in its message, if
// at all.
func (r *profilesReader) syntax(text []byte, err error) {
	message := strings.TrimPrefix(err.Error(), "yaml: ")
	line := 1
	if m := syntaxLine.FindStringSubmatch(message); m != nil {
		line, _ = strconv.Atoi(m[1])
		message = message[len(m[0]):]
	}
	where := ""
	if oneLater.MatchString(message) {
		line, where = line+1, ", here or below"
	} else if m := unknownAnchor.FindStringSubmatch(message); m != nil {
		if at := bytes.Index(text, []byte("*"+m[1])); at >= 0 {
			line = lineAt(text, at)
		}
	}
	r.fault(line, "not YAML%s: %s", where, strings.ReplaceAll(message, "\n", " "))
}

func lineAt(text []byte, at int) int { return 1 + bytes.Count(text[:at], []byte("\n")) }

// A yamlField is one field of a mapping.
type yamlField struct {
	name       string
	key, value *yaml.Node
}

func resolve(n *yaml.Node) *yaml.Node {
	for n.Kind == yaml.AliasNode {
		n = n.Alias
	}
	return n
}

// fields lists the fields of a mapping, those of what it merges after its own; a
// field that is named again is left out. Of says what n is.
func (r *profilesReader) fields(n *yaml.Node, of string) []yamlField {
	var fields []yamlField
	seen := map[string]int{}
	merged := map[*yaml.Node]bool{} // which may merge itself
	var add func(n *yaml.Node, what string)
	add = func(n *yaml.Node, what string) {
		if n = resolve(n); merged[n] {
			return
		}
		merged[n] = true
		if n.Kind != yaml.MappingNode {
			r.fault(n.Line, "%s must be a mapping of fields, and is %s", what, kindOf(n))
			return
		}
		own := map[string]int{}
		var merges []*yaml.Node
		for i := 0; i+1 < len(n.Content); i += 2 {
			key, value := n.Content[i], n.Content[i+1]
			name := resolve(key)
			if name.Kind != yaml.ScalarNode {
				r.fault(key.Line, "the name of a field of %s must be text", of)
				continue
			}
			if name.Tag == "!!merge" {
				if v := resolve(value); v.Kind == yaml.SequenceNode {
					merges = append(merges, v.Content...)
				} else {
					merges = append(merges, v)
				}
				continue
			}
			if line, twice := own[name.Value]; twice {
				r.fault(key.Line, "%s has %s twice: it is in line %d too", of, shown(name.Value), line)
				continue
			}
			own[name.Value] = key.Line
			if _, taken := seen[name.Value]; !taken {
				seen[name.Value] = key.Line
				fields = append(fields, yamlField{name.Value, key, value})
			}
		}
		for _, m := range merges {
			add(m, "what "+of+" merges")
		}
	}
	add(n, of)
	return fields
}

func kindOf(n *yaml.Node) string {
	switch {
	case n.Kind == yaml.MappingNode:
		return "a mapping"
	case n.Kind == yaml.SequenceNode:
		return "a list"
	case n.Tag == "!!null":
		return "empty"
	}
	return shown(n.Value)
}

func (r *profilesReader) root(n *yaml.Node) {
	r.file.Line = max(1, n.Line)
	found := false
	for _, f := range r.fields(n, "the file") {
		switch {
		case f.name == "profiles":
			found = true
			r.file.Line = f.key.Line
			r.profiles(f.value)
		case !strings.HasPrefix(f.name, "x-"):
			r.fault(f.key.Line, "there is no field %s here: the one field is profiles", shown(f.name))
		}
	}
	if !found && resolve(n).Kind == yaml.MappingNode {
		r.fault(n.Line, "the file has no field profiles")
	}
}

func (r *profilesReader) profiles(n *yaml.Node) {
	if v := resolve(n); v.Kind != yaml.MappingNode || len(v.Content) == 0 {
		r.fault(r.file.Line, "profiles must have a field for each profile, by its name, and is %s", emptyOr(v))
		return
	}
	hasDefault := false
	for i, f := range r.fields(n, "profiles") {
		if i == maxProfiles {
			r.fault(f.key.Line, "there are more than %d profiles", maxProfiles)
			return
		}
		hasDefault = hasDefault || f.name == DefaultProfile
		r.profile(f)
	}
	if !hasDefault {
		r.fault(r.file.Line, "there is no profile named %q: sign-ups that name none take it", DefaultProfile)
	}
}

func emptyOr(n *yaml.Node) string {
	if n.Kind == yaml.MappingNode {
		return "empty"
	}
	return kindOf(n)
}

// The fields of a profile.
var profileFields = []string{"base_workflow", "language", "app_description", "key_scopes", "extra_keys", "allowed_scopes",
	"show_tenant", "retention", "max_key_age", "pool"}

func (r *profilesReader) profile(f yamlField) {
	p := Profile{Name: f.name, BaseWorkflow: KnownWorkflows[0], PoolMin: DefaultPoolMin, PoolMax: DefaultPoolMax}
	r.of = "profile " + shown(f.name)
	r.lines, r.unread = map[string]int{"": f.key.Line}, map[string]bool{}
	if resolve(f.value).Kind != yaml.MappingNode {
		r.unread["key_scopes"] = true
	}
	for _, field := range r.fields(f.value, r.of) {
		r.lines[field.name] = field.key.Line
		switch field.name {
		case "base_workflow":
			p.BaseWorkflow = r.text(field.value, field.name)
		case "language":
			p.Language = r.text(field.value, field.name)
		case "app_description":
			p.AppDescription = r.text(field.value, field.name)
		case "key_scopes":
			p.KeyScopes = r.texts(field.value, field.name)
		case "extra_keys":
			p.ExtraKeys = r.extraKeys(field.value)
		case "allowed_scopes":
			if p.AllowedScopes = r.texts(field.value, field.name); len(p.AllowedScopes) == 0 && !r.unread[field.name] {
				r.bad(field.key.Line, field.name, "is empty: leave it out to allow the scopes of key_scopes and extra_keys")
			}
		case "show_tenant":
			if p.ShowTenant = ShowTenant(r.text(field.value, field.name)); p.ShowTenant == showNone {
				p.ShowTenant = ShowNothing
			}
		case "retention":
			p.Retention = r.duration(field.value, field.name, 1)
		case "max_key_age":
			p.MaxKeyAge = r.duration(field.value, field.name, minKeyAge)
		case "pool":
			r.pool(field.value, field.name, &p)
		default:
			r.fault(field.key.Line, "%s has no field %s; there are %s", r.of, shown(field.name), strings.Join(profileFields, ", "))
		}
	}
	for _, fault := range p.Check() {
		if !r.unread[fault.Field] {
			r.file.Faults = append(r.file.Faults, ProfileLine{r.within(r.lineOf(fault.Field)), r.of + ": " + fault.String(), fault.Warning})
		}
	}
	r.file.Profiles = append(r.file.Profiles, p)
}

// showNone is how a file spells ShowNothing.
const showNone = "none"

// lineOf is the line of the field, or of the nearest around it.
func (r *profilesReader) lineOf(field string) int {
	for {
		if line, ok := r.lines[field]; ok {
			return line
		}
		field = field[:max(0, strings.LastIndexAny(field, ".["))]
	}
}

// bad reports a field that cannot be read, and is left empty.
func (r *profilesReader) bad(line int, field, format string, args ...any) {
	r.unread[field] = true
	r.fault(line, "%s: %s: %s", r.of, field, fmt.Sprintf(format, args...))
}

// text reads a scalar that is text.
func (r *profilesReader) text(n *yaml.Node, field string) string {
	switch v := resolve(n); {
	case v.Kind == yaml.ScalarNode && v.Tag == "!!str" && v.Value != "":
		return v.Value
	case v.Kind == yaml.ScalarNode && (v.Tag == "!!null" || v.Value == ""):
		r.bad(n.Line, field, "is empty: leave it out, or give it a text")
	case v.Kind == yaml.ScalarNode:
		r.bad(n.Line, field, "must be text, and is %s: put it in quotes", kindOf(v))
	default:
		r.bad(n.Line, field, "must be text, and is %s", kindOf(v))
	}
	return ""
}

// texts reads a list of texts.
func (r *profilesReader) texts(n *yaml.Node, field string) []string {
	v := resolve(n)
	if v.Kind != yaml.SequenceNode {
		r.bad(n.Line, field, "must be a list of texts, and is %s", kindOf(v))
		return nil
	}
	if len(v.Content) > maxListedScopes {
		r.bad(n.Line, field, "has %d entries: at most %d are allowed", len(v.Content), maxListedScopes)
		return nil
	}
	var list []string
	for i, item := range v.Content {
		at := fmt.Sprintf("%s[%d]", field, i)
		r.lines[at] = item.Line
		list = append(list, r.text(item, at))
	}
	return list
}

func (r *profilesReader) extraKeys(n *yaml.Node) []KeyTemplate {
	var keys []KeyTemplate
	for i, f := range r.fields(n, r.of+": extra_keys") {
		if i > MaxExtraKeys { // so many are a fault, and need not be read
			break
		}
		k := KeyTemplate{Name: f.name}
		at := extraKeyField(f.name)
		r.lines[at] = f.key.Line
		if resolve(f.value).Kind != yaml.MappingNode {
			r.unread[at+".scopes"] = true
		}
		for _, of := range r.fields(f.value, r.of+": "+at) {
			if of.name != "scopes" {
				r.fault(of.key.Line, "%s: %s has no field %s; there is scopes", r.of, at, shown(of.name))
				continue
			}
			r.lines[at+".scopes"] = of.key.Line
			k.Scopes = r.texts(of.value, at+".scopes")
		}
		keys = append(keys, k)
	}
	return keys
}

var days = regexp.MustCompile(`^(\d{1,5})d(.*)$`)

// maxAge bounds times: more is a slip of the pen.
const maxAge = 36500 * 24 * time.Hour

// duration reads a time such as 90d, 12h or 1d12h, of at least least.
func (r *profilesReader) duration(n *yaml.Node, field string, least time.Duration) time.Duration {
	v := resolve(n)
	rest, d := v.Value, time.Duration(0)
	m := days.FindStringSubmatch(rest)
	if m != nil {
		count, _ := strconv.Atoi(m[1]) // five digits: no more than a Duration holds
		d, rest = time.Duration(count)*24*time.Hour, m[2]
	}
	part, err := time.Duration(0), error(nil)
	if m == nil || rest != "" {
		part, err = time.ParseDuration(rest)
	}
	switch {
	case v.Kind != yaml.ScalarNode || err != nil:
		r.bad(n.Line, field, "must be a time such as 7d or 12h, and is %s", kindOf(v))
	case part < 0 || part > maxAge || d > maxAge-part:
		r.bad(n.Line, field, "%s must be from 0 to %dd", shown(v.Value), maxAge/(24*time.Hour))
	case d+part == 0:
		r.bad(n.Line, field, "must be more than 0: leave it out for what holds without it")
	case d+part < least:
		r.bad(n.Line, field, "%s must be at least %s", shown(v.Value), least)
	default:
		return d + part
	}
	return 0
}

func (r *profilesReader) pool(n *yaml.Node, field string, p *Profile) {
	var fewest, most *int
	for _, f := range r.fields(n, r.of+": "+field) {
		at := field + "." + f.name
		r.lines[at] = f.key.Line
		switch f.name {
		case "min":
			n := r.count(f.value, at)
			fewest = &n
		case "max":
			n := r.count(f.value, at)
			most = &n
		default:
			r.fault(f.key.Line, "%s: %s has no field %s; there are min and max", r.of, field, shown(f.name))
		}
	}
	p.PoolMin, p.PoolMax = PoolBoundsOf(fewest, most)
	if most == nil {
		r.unread[field+".max"] = true // what is wrong with it is wrong with min
	}
	if p.PoolMax == 0 && p.PoolMin > 0 && !r.unread[field+".max"] { // which in a Profile means no bound
		r.bad(r.lines[field+".max"], field, "min %d is more than max 0", p.PoolMin)
	}
}

func (r *profilesReader) count(n *yaml.Node, field string) int {
	v := resolve(n)
	count, err := strconv.Atoi(v.Value)
	if v.Kind != yaml.ScalarNode || v.Tag != "!!int" || err != nil {
		r.bad(n.Line, field, "must be a whole number, and is %s", kindOf(v))
		return 0
	}
	return count
}
