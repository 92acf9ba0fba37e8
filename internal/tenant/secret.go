package tenant

// A Secret is a PAT, a key or a token. However it is printed, logged or encoded
// it reads [redacted]; a search for Reveal finds every place its text is used.
// The zero Secret is unset, and revealing it panics.
//
// The text is behind a func because fmt prints the unexported fields of a
// surrounding struct without asking String.
type Secret struct{ text func() string }

const redacted = "[redacted]"

// NewSecret wraps text.
func NewSecret(text string) Secret { return Secret{func() string { return text }} }

// String returns "[redacted]".
func (Secret) String() string { return redacted }

// GoString returns "[redacted]".
func (Secret) GoString() string { return redacted }

// MarshalText encodes as "[redacted]".
func (Secret) MarshalText() ([]byte, error) { return []byte(redacted), nil }

// IsSet reports whether s holds a text.
func (s Secret) IsSet() bool { return s.text != nil }

// Reveal returns the text. Never print, log or wrap what it returns.
func (s Secret) Reveal() string { return s.text() }
