package clarifaisim

import (
	"fmt"
	"maps"
	"slices"
)

// Settings are how the simulator behaves. Most of them are a switch for something
// that is not publicly known about Clarifai. Times are in milliseconds.
type Settings struct {
	// RateLimit is how many calls a user may make in any second, with all PATs and
	// keys together; 0 means no limit. Calls beyond it get 11005 and do not count.
	RateLimit int `json:"rate_limit"`
	// LatencyMS is how long each call to Clarifai takes before it is looked at.
	LatencyMS int `json:"latency_ms"`

	// HTTPCodes overrides the HTTP code that goes with a status code.
	HTTPCodes map[int]int `json:"http_codes"`
	// DuplicateCode answers an app id that is taken: 40010, or 11102 with details
	// that say "already exist".
	DuplicateCode int `json:"duplicate_code"`
	// PATOnlyCode answers an app-specific key at a call that wants a PAT.
	PATOnlyCode int `json:"pat_only_code"`
	// UnknownKeyCode answers a credential that does not exist: 11008, or 11009
	// with details that repeat the credential, as Clarifai was seen to do.
	UnknownKeyCode int `json:"unknown_key_code"`

	// FirstKey makes a key that nobody asked for with each new app.
	FirstKey bool `json:"first_key"`
	// MaskedKeys hides all but the last four characters of a key's id everywhere
	// but in the answer of PostKeys.
	MaskedKeys bool `json:"masked_keys"`
	// HonourExpiresAt makes keys stop working at their expires_at.
	HonourExpiresAt bool `json:"honour_expires_at"`
	// MaxIDLength is the longest app id.
	MaxIDLength int `json:"max_id_length"`
	// AppQuota is how many apps a user may have, and KeyQuota how many keys an app;
	// 0 means any number. Beyond it is 11006.
	AppQuota int `json:"app_quota"`
	KeyQuota int `json:"key_quota"`
	// SeveralItems is what becomes of a PostApps or PostKeys with several items of which
	// one fails: SeveralAll, SeveralFirst, SeveralPartial or SeveralRefused.
	SeveralItems string `json:"several_items"`
	// FailingItem is which item, counted from 1, of such a call fails by itself, with
	// 98004; 0 means none.
	FailingItem int `json:"failing_item"`
	// AsyncDeleteMS makes DeleteApp answer 10070 and the app go only so much later;
	// its keys die at once. 0 means 10000, and gone.
	AsyncDeleteMS int `json:"async_delete_ms"`
	// Shares are apps that their owners have shared with other users as collaborators. A
	// collaborator's PAT may do at such an app what an app-specific key may do, too.
	Shares []Share `json:"shares"`
	// CollaboratorCode answers a collaborator at a call that wants the PAT of the owner:
	// 11101 or 11007.
	CollaboratorCode int `json:"collaborator_code"`
	// ConsistencyDelayMS hides a new app or key from all GET calls for so long. Its
	// id is taken and a new key works from the start.
	ConsistencyDelayMS int `json:"consistency_delay_ms"`
	// ConsistencyForChanges hides a new key for so long from DeleteKey and PatchKeys, too.
	ConsistencyForChanges bool `json:"consistency_for_changes"`
}

// What becomes of a call with several items of which one fails. Of Clarifai it is not known.
const (
	SeveralAll     = "all"     // none is made, and the answer is the failure of the first that fails
	SeveralFirst   = "first"   // those before it are made, and the answer is the failure
	SeveralPartial = "partial" // the others are made, and the answer, 10010, shows them
	SeveralRefused = "refused" // calls with several items get 11102 and make nothing, whether or not one fails
)

// DefaultSettings are Clarifai as far as it is known: 15 calls a second, nothing
// slow.
func DefaultSettings() Settings {
	return Settings{
		RateLimit:       15,
		HTTPCodes:       map[int]int{},
		DuplicateCode:   codeDuplicate,
		PATOnlyCode:     codeKeyInvalid,
		UnknownKeyCode:  codeKeyInvalid,
		HonourExpiresAt: true,
		MaxIDLength:     32,
		SeveralItems:    SeveralAll,
		Shares:          []Share{},

		CollaboratorCode: codeDoesNotExist,
	}
}

// A Share is one app that is shared with one user.
type Share struct {
	UserID string `json:"user_id"` // of the owner
	AppID  string `json:"app_id"`
	With   string `json:"with"` // the collaborator
}

func (s Settings) clone() Settings {
	codes := make(map[int]int, len(s.HTTPCodes))
	maps.Copy(codes, s.HTTPCodes)
	s.HTTPCodes = codes
	s.Shares = slices.Clone(s.Shares)
	return s
}

func (s Settings) check() error {
	for name, v := range map[string]int{
		"rate_limit": s.RateLimit, "latency_ms": s.LatencyMS, "app_quota": s.AppQuota, "key_quota": s.KeyQuota, "failing_item": s.FailingItem,
		"async_delete_ms": s.AsyncDeleteMS, "consistency_delay_ms": s.ConsistencyDelayMS,
	} {
		if v < 0 {
			return fmt.Errorf("%s is %d: it has to be 0 or more", name, v)
		}
	}
	for code, http := range s.HTTPCodes {
		if http < 200 || http > 599 {
			return fmt.Errorf("http_codes has HTTP code %d for %d: it has to be 200 to 599", http, code)
		}
	}
	switch {
	case s.DuplicateCode != codeDuplicate && s.DuplicateCode != codeInvalidRequest:
		return fmt.Errorf("duplicate_code is %d: it has to be %d or %d", s.DuplicateCode, codeDuplicate, codeInvalidRequest)
	case s.UnknownKeyCode != codeKeyInvalid && s.UnknownKeyCode != codeKeyNotFound:
		return fmt.Errorf("unknown_key_code is %d: it has to be %d or %d", s.UnknownKeyCode, codeKeyInvalid, codeKeyNotFound)
	case s.CollaboratorCode != codeDoesNotExist && s.CollaboratorCode != codeScopes:
		return fmt.Errorf("collaborator_code is %d: it has to be %d or %d", s.CollaboratorCode, codeDoesNotExist, codeScopes)
	case !isFailure(s.PATOnlyCode):
		return fmt.Errorf("pat_only_code is %d: it has to be the code of a failure", s.PATOnlyCode)
	case !slices.Contains([]string{SeveralAll, SeveralFirst, SeveralPartial, SeveralRefused}, s.SeveralItems):
		return fmt.Errorf("several_items is %q: it has to be %s, %s, %s or %s", s.SeveralItems, SeveralAll, SeveralFirst, SeveralPartial, SeveralRefused)
	case s.MaxIDLength < 1:
		return fmt.Errorf("max_id_length is %d: it has to be 1 or more", s.MaxIDLength)
	}
	return nil
}

// Settings returns the settings in force.
func (s *Sim) Settings() Settings {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.settings.clone()
}

// SetSettings replaces the settings. An error leaves them as they were.
func (s *Sim) SetSettings(settings Settings) error {
	return s.Update(func(now *Settings) { *now = settings.clone() })
}

// Update changes the settings in one step. An error leaves them as they were.
func (s *Sim) Update(edit func(*Settings)) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	settings := s.settings.clone()
	edit(&settings)
	if err := settings.check(); err != nil {
		return err
	}
	s.settings = settings
	return nil
}
