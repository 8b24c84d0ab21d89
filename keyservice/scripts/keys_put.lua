-- Write key records, all or none. KEYS: keys, epoch. ARGV: number, nonce, the keys_n that the decision was made on ("" if
-- it does not matter), then per record: kid, the rev it must have now (-1: none), the record as JSON.
-- Returns {the new keys_n}. A published_at or retiring_at that is new is no earlier than this write: waits are counted
-- from these times, and whatever held the writer up since it decided must not shorten them.
local refusal = check_epoch(KEYS[2], ARGV[1], ARGV[2])
if refusal then
  return refusal
end

local order = {prepared = 0, published = 1, active = 2, retiring = 3, removed = 4, compromised = 5}
local now = math.ceil(server_ms() / 1000)
local stored = {}
if ARGV[3] ~= '' and (redis.call('HGET', KEYS[2], 'keys_n') or '0') ~= ARGV[3] then
  return redis.error_reply('TRUST_REV the key set has changed')
end
for i = 4, #ARGV, 3 do
  local held = redis.call('HGET', KEYS[1], ARGV[i])
  local record = cjson.decode(ARGV[i + 2])
  local rev, state, before = -1, nil, {}
  if held then
    before = cjson.decode(held)
    rev, state = before.rev, before.state
  end
  if rev ~= tonumber(ARGV[i + 1]) or record.rev <= rev then
    return redis.error_reply('TRUST_REV a record has changed')
  end
  if not order[record.state] or (state and order[record.state] < order[state]) then
    return redis.error_reply('TRUST_STATE a state only moves forward')
  end
  stored[i] = ARGV[i + 2]
  for _, name in ipairs({'published_at', 'retiring_at'}) do
    if type(record[name]) == 'number' and type(before[name]) ~= 'number' and record[name] < now then
      record[name] = now
      stored[i] = cjson.encode(record)
    end
  end
end
for i = 4, #ARGV, 3 do
  redis.call('HSET', KEYS[1], ARGV[i], stored[i])
end
return {redis.call('HINCRBY', KEYS[2], 'keys_n', 1)}
