package state

// Event is something that happened in the cluster. Events are for people to
// watch; nothing depends on them, and they are not part of the state.
type Event struct {
	At         int64 // Unix milliseconds; 0: set by who takes it
	Type       string
	Action     string
	ID, Name   string
	Attributes map[string]string
}

// maxEvents bounds what is kept for nobody.
const maxEvents = 4096

// event notes one. attrs are keys and values.
func (s *State) event(typ, action, id, name string, attrs ...string) {
	e := Event{Type: typ, Action: action, ID: id, Name: name}
	for i := 0; i+1 < len(attrs); i += 2 {
		if attrs[i+1] != "" {
			if e.Attributes == nil {
				e.Attributes = map[string]string{}
			}
			e.Attributes[attrs[i]] = attrs[i+1]
		}
	}
	if len(s.events) < maxEvents {
		s.events = append(s.events, e)
	}
}

// taskEvent notes the state that a task has come to.
func (s *State) taskEvent(t *task, action string) {
	svc := ""
	if v := s.services[t.Service]; v != nil {
		svc = v.Spec.Name
	}
	msg := ""
	if t.Status.State.Ended() {
		msg = t.Status.Message
	}
	s.event("task", action, t.ID, t.Name, "service", svc, "node", s.nodeName(t.Node), "message", msg)
}

// TakeEvents returns what happened since the last call.
func (s *State) TakeEvents() []Event {
	out := s.events
	s.events = nil
	return out
}
