package tenant

import (
	"encoding/hex"
	"fmt"
	"regexp"
	"strings"
	"unicode"
	"unicode/utf8"
)

// Limits on what a caller may send, in characters.
const (
	MaxIDLength          = 128
	MaxDisplayNameLength = 256
	MaxLabels            = 16
	MaxLabelKeyLength    = 63
	MaxLabelValueLength  = 256
)

// ParseID returns s as a tenant id, or an Invalid error that says which rule it
// breaks: 1 to 128 characters of UTF-8, no control characters, slash or white
// space, and neither "." nor "..", which clients and proxies would resolve as
// paths.
func ParseID(s string) (ID, error) {
	const field = "tenant_id"
	if s == "" {
		return "", invalid(field, "is empty: it must have 1 to %d characters", MaxIDLength)
	}
	if !utf8.ValidString(s) {
		return "", invalid(field, "is not valid UTF-8")
	}
	if n := utf8.RuneCountInString(s); n > MaxIDLength {
		return "", invalid(field, "has %d characters: at most %d are allowed", n, MaxIDLength)
	}
	if s == "." || s == ".." {
		return "", invalid(field, "must not be %q", s)
	}
	for i, r := range s {
		switch {
		case r == '/':
			return "", invalid(field, "has a slash at byte %d", i)
		case unicode.IsSpace(r):
			return "", invalid(field, "has white space at byte %d", i)
		case unicode.IsControl(r):
			return "", invalid(field, "has a control character at byte %d", i)
		}
	}
	return ID(s), nil
}

var profileName = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)

// ValidProfileName reports whether s can name a profile.
func ValidProfileName(s string) bool { return profileName.MatchString(s) }

// Validate checks the attributes of s. Whether the profile exists is for the
// service to say.
func (s SignUp) Validate() error {
	if s.DisplayName != nil {
		if err := validText("display_name", *s.DisplayName, MaxDisplayNameLength); err != nil {
			return err
		}
	}
	if err := s.Within.CheckLabels(s.Labels); err != nil {
		return err
	}
	return ValidateLabels(s.Attributes().Labels)
}

var labelKey = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9._/-]*[A-Za-z0-9])?$`)

// ValidateLabels checks a set of labels.
func ValidateLabels(labels map[string]string) error {
	if len(labels) > MaxLabels {
		return invalid("labels", "has %d labels: at most %d are allowed", len(labels), MaxLabels)
	}
	for k, v := range labels {
		if len(k) > MaxLabelKeyLength || !labelKey.MatchString(k) {
			return invalid("labels", "key %s must have 1 to %d characters of A-Z a-z 0-9 . _ / - and begin and end with a letter or digit",
				shown(k), MaxLabelKeyLength)
		}
		if err := validText("labels."+k, v, MaxLabelValueLength); err != nil {
			return err
		}
	}
	return nil
}

// MaxCallerNameLength bounds the name of a caller, in characters.
const MaxCallerNameLength = 128

// ValidateCallerName checks the name of who holds a token. It is printed on
// terminals and written to logs, and says nothing that cannot be seen there.
func ValidateCallerName(name string) error {
	const field = "name"
	if strings.TrimSpace(name) == "" {
		return invalid(field, "is empty")
	}
	if err := validText(field, name, MaxCallerNameLength); err != nil {
		return err
	}
	if i := strings.IndexFunc(name, func(r rune) bool { return !unicode.IsPrint(r) }); i >= 0 {
		return invalid(field, "has a character at byte %d that cannot be printed", i)
	}
	return nil
}

func validText(field, s string, most int) error {
	if !utf8.ValidString(s) {
		return invalid(field, "is not valid UTF-8")
	}
	if n := utf8.RuneCountInString(s); n > most {
		return invalid(field, "has %d characters: at most %d are allowed", n, most)
	}
	for i, r := range s {
		if unicode.IsControl(r) {
			return invalid(field, "has a control character at byte %d", i)
		}
	}
	return nil
}

// shown quotes s for a message, shortened.
func shown(s string) string {
	const most = 40
	if len(s) > most {
		return fmt.Sprintf("%q…", strings.ToValidUTF8(s[:most], ""))
	}
	return fmt.Sprintf("%q", s)
}

var appPrefix = regexp.MustCompile(`^[a-z0-9]{1,5}$`)

// ValidAppPrefix reports whether s can begin our app ids: Clarifai allows 32
// characters, and a hyphen and a ULID take 27 of them.
func ValidAppPrefix(s string) bool { return appPrefix.MatchString(s) }

// codeOf turns the path of a field into the last part of an error code.
func codeOf(field string) string {
	name, _, _ := strings.Cut(field, ".")
	return name
}

func hexPrefix(sum []byte) string { return hex.EncodeToString(sum[:6]) }
