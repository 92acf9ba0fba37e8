package tenant

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/base32"
	"strings"
	"time"
)

// A Role is what a caller may do.
type Role string

// The roles of callers. A viewer and an admin never see a key's secret.
const (
	Viewer      Role = "viewer"
	Provisioner Role = "provisioner"
	Admin       Role = "admin"
)

// Roles lists every role.
var Roles = []Role{Viewer, Provisioner, Admin}

// A Caller is a program or person that holds a Tenantry token.
type Caller struct {
	TokenID    string
	Name       string
	Role       Role
	CreatedAt  time.Time
	ExpiresAt  time.Time // zero means never
	RevokedAt  time.Time // zero means not revoked
	LastUsedAt time.Time // zero means never; exact to a minute
	Scope      Scope     // which tenants it sees and changes
	RateLimit  int       // requests a second, in each replica; 0 means no limit
	ReplacedBy string    // the id of the token that a rotation made; empty if there was none
}

// An Actor says who asked for a change: for the audit log, and for the transaction that makes it.
type Actor struct {
	Name      string // "caller:<token id>", "worker" or "operator" (the command line)
	RequestID string // empty outside a request
	// Within limits the tenants that it may change, and whose keys it may be shown. The transaction checks it,
	// since labels may change until then.
	Within Scope
	// UpstreamRequestID is Clarifai's id of the call that the change comes of; may be empty.
	UpstreamRequestID string
}

// A Token is what a caller sends: tnty_<id>_<secret>.
type Token struct {
	ID   string
	Hash []byte // SHA-256 of the secret part
}

// TokenPrefix begins every token.
const TokenPrefix = "tnty_"

// crockford is base32 in lower case without letters that are mistaken for digits.
var crockford = base32.NewEncoding("0123456789abcdefghjkmnpqrstvwxyz").WithPadding(base32.NoPadding)

const (
	tokenIDBytes     = 10 // 16 characters
	tokenSecretBytes = 32 // 52 characters
)

// NewToken makes a token. Its text is shown once and cannot be had again.
func NewToken() (Token, Secret) {
	id, secret := randomText(tokenIDBytes), randomText(tokenSecretBytes)
	return Token{ID: id, Hash: hashToken(secret)}, NewSecret(TokenPrefix + id + "_" + secret)
}

// ParseToken splits a token's text. It reports false for what cannot be one.
func ParseToken(s string) (Token, bool) {
	rest, ok := strings.CutPrefix(s, TokenPrefix)
	if !ok {
		return Token{}, false
	}
	id, secret, ok := strings.Cut(rest, "_")
	if !ok || len(id) != crockford.EncodedLen(tokenIDBytes) || len(secret) != crockford.EncodedLen(tokenSecretBytes) {
		return Token{}, false
	}
	for _, part := range []string{id, secret} {
		if _, err := crockford.DecodeString(part); err != nil {
			return Token{}, false
		}
	}
	return Token{ID: id, Hash: hashToken(secret)}, true
}

func hashToken(secret string) []byte {
	sum := sha256.Sum256([]byte(secret))
	return sum[:]
}

func randomText(n int) string {
	b := make([]byte, n)
	_, _ = rand.Read(b) // never fails
	return crockford.EncodeToString(b)
}
